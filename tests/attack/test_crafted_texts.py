"""What a saved graph says of itself is what it computes: scheme, records, ranges, sizes, JSON."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import fxquant
from fxquant.checkpoint import manifest
from fxquant.checkpoint.manifest import MANIFEST, is_checkpoint
from fxquant.errors import CheckpointError, GraphCallError
from fxquant.ir.graph import info, is_op, update_info
from fxquant.ir.leaves import InverseScale
from fxquant.ir.legal_forms import OPS
from tests.architectures import gpt2, llama, opt, token_ids
from tests.attack.mutations import write
from tests.attack.test_crafted_checkpoints import changed, fill

Data = dict[str, Any]
CALIBRATION = [token_ids(2, 12, seed=3)]
SCHEMES = {
    "static": "w8a8-static:absmax+smooth",
    "groups": "w4-g16-asym+awq",
    "token": "w8a8-dynamic-token+attn8",
    "kv8": "w8+kv8",
    "insert": "w8a8-static-asym+smooth(insert=true)",
    "mixed": '{"scheme": "w8a8-static", "overrides": {"head": "w8", "*.up_proj": "w4"}}',
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("texts")
    for name, scheme in SCHEMES.items():
        graph = fxquant.convert(llama(num_hidden_layers=1), scheme, calibration=CALIBRATION)
        fxquant.save(graph, parent / name)
    return parent


def record(data: Data, end: str, operand: str = "") -> Data:
    found: Data = next(
        each
        for each in data["info"]["site_records"]
        if each["path"].endswith(end) and each["operand"] == operand
    )
    return found


def scheme(text: str) -> Callable[[Data], object]:
    return lambda data: data["info"].update(scheme=text)


def of_record(end: str, **values: Any) -> Callable[[Data], object]:
    return lambda data: record(data, end).update(values)


def both(*changes: Callable[[Data], object]) -> Callable[[Data], object]:
    return lambda data: [change(data) for change in changes] and None


def all_records(**values: Any) -> Callable[[Data], object]:
    return lambda data: [each.update(values) for each in data["info"]["site_records"]] and None


def literal(target: str, index: int, value: Any) -> Callable[[Data], object]:
    def change(data: Data) -> None:
        for node in data["nodes"]:
            if target in node[2]:
                node[3][index] = value

    return change


def swapped(data: Data) -> None:
    """Two sites' ranges change places, in their records."""
    one, other = record(data, "down_proj"), record(data, "q_proj")
    for name in ("scale", "low", "high", "seen_low", "seen_high", "clipped", "histogram"):
        one[name], other[name] = other[name], one[name]


def of_another_site(data: Data) -> None:
    """down_proj's input is rounded in the range of q_proj's, and the other way round."""
    one, other = (
        next(node for node in data["nodes"] if node[2].endswith(f"{name}.input_scale"))
        for name in ("q_proj", "down_proj")
    )
    one[2], other[2] = other[2], one[2]


TEXTS: dict[str, tuple[str, Callable[[Data], object], str]] = {
    "fewer bits": ("static", scheme("w4a8-static:absmax+smooth"), "its record says w8a8-static"),
    "fewer bits twice": (
        "static",
        both(scheme("w4a8-static:absmax+smooth"), all_records(spec="w4a8-static:absmax")),
        r"weight: expected torch\.uint8",
    ),
    "granularity": (
        "static",
        both(
            scheme("w8-tensor/a8-static:absmax+smooth"),
            all_records(spec="w8-tensor/a8-static:absmax"),
        ),
        r"weight_scale: expected float32 of shape \[\]",
    ),
    "groups": (
        "groups",
        both(scheme("w4-g32-asym+awq"), all_records(spec="w4-g32-asym")),
        "weight_scale: expected float32",
    ),
    "estimator": (
        "static",
        both(scheme("w8a8-static:mse+smooth"), all_records(spec="w8a8-static:mse")),
        "its range is said to be by absmax, its spec says mse",
    ),
    "dynamic": (
        "static",
        both(
            scheme("w8a8-dynamic+smooth"),
            all_records(
                spec="w8a8-dynamic", scale=None, zero_point=None, estimator=None, low=None,
                high=None, seen_low=None, seen_high=None, clipped=None, histogram=[],
            ),
        ),
        "which is not what scheme w8a8-dynamic",
    ),
    "per tensor": (
        "token",
        both(
            scheme("w8a8-dynamic+attn8"),
            lambda data: [
                each.update(spec=each["spec"].replace("-token", ""))
                for each in data["info"]["site_records"]
            ]
            and None,
        ),
        "its dynamic range is by",
    ),
    "without the product": (
        "token",
        scheme('{"scheme": "w8a8-dynamic-token+attn8", "overrides": {"matmul": "fp"}}'),
        "it stays float",
    ),
    "without activations": (
        "token",
        both(scheme("w8+attn8"), all_records(spec="w8")),
        "its record says w8, by scheme w8[+]attn8 it is a8-dynamic-token",
    ),
    "a repair that never ran": ("groups", scheme("w4-g16-asym+awq+gptq"), "names gptq"),
    "another option": ("static", scheme("w8a8-static:absmax+smooth(alpha=0.9)"), "names smooth"),
    "a default left out": ("insert", scheme("w8a8-static-asym+smooth"), "names smooth"),
    "a name of none": ("groups", scheme("w4-g16-asym+awq+magic"), "unknown pass"),
    "an override": (
        "mixed",
        scheme('{"scheme": "w8a8-static", "overrides": {"head": "w8"}}'),
        r"up_proj: its record says w4, by scheme .* it is w8a8-static",
    ),
    "an override of none": (
        "mixed",
        scheme(SCHEMES["mixed"].replace("}}", ', "*.nothing": "w4"}}')),
        "matches no site",
    ),
    "spelled otherwise": ("groups", scheme(" w4-g16-asym+awq"), "is spelled"),
    "bits of a cache": ("kv8", literal("store_kv", 1, 4), "a cache of 4 bits"),
    "a cache by name": (
        "kv8",
        both(
            scheme("w8+kv4"),
            lambda d: [h.update(name="kv4", spelling="kv4") for h in d["info"]["history"][1:2]]
            and None,
        ),
        "nothing stores its cache",
    ),
    "a record twice": (
        "static",
        lambda d: d["info"]["site_records"].append(dict(d["info"]["site_records"][0])),
        "it has 2 records",
    ),
    "a record less": ("static", lambda d: d["info"]["site_records"].pop(), "nothing is recorded"),
    "a record elsewhere": ("static", of_record("q_proj", path="lm_head"), "it stays float"),
    "ranges change places": ("static", swapped, "of its input is recorded as"),
    "another site's range": ("static", of_another_site, "_proj: the scale .* is recorded as"),
    "a scale": ("static", of_record("down_proj", scale=0.5), "not those of its recorded range"),
    "a range": ("static", of_record("down_proj", low=-9.0, high=9.0), "not those of its recorded"),
    "a zero point": ("insert", of_record("down_proj", zero_point=99), "zero point 99"),
    "a share": ("static", of_record("down_proj", clipped=0.5), "share outside"),
    "an SQNR": ("static", of_record("down_proj", weight_sqnr=None), "has an SQNR"),
    "ends": ("static", both(literal("quantize.default", 3, -7), literal("quantize.default", 4, 7)),
             r"codes -7\.\.7 of its input"),
    "a site's shape": ("groups", lambda d: d["info"]["sites"][-1].update(shape=[9, 9]), "recorded"),
    "a scheme at float": (
        "static", lambda d: d["info"].update(level="float"), "records of codes at level float"),
    "positions": ("static", lambda d: d["info"].update(max_positions=10**9), "1 to 16777216"),
    "other positions": ("static", lambda d: d["info"].update(max_positions=10**6), "model's conf"),
    "a vocabulary": (
        "static", lambda d: d["info"].update(vocab_size=10**9, embeddings=None), "of 128 row"),
}  # fmt: skip


def crafted(folders: Path, name: str, tmp_path: Path, change: Callable[[Data], object]) -> Path:
    copy = Path(shutil.copytree(folders / name, tmp_path / "copy"))
    data = json.loads((copy / "graph.json").read_text())
    change(data)
    write(copy, data)
    return copy


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_printed_is_what_is_computed(name: str, folders: Path, tmp_path: Path) -> None:
    base, change, message = TEXTS[name]
    copy = crafted(folders, base, tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        fxquant.load(copy)


@pytest.mark.parametrize("name", SCHEMES)
def test_as_it_was_written_it_loads(name: str, folders: Path) -> None:
    assert info(fxquant.load(folders / name)).scheme == SCHEMES[name]


def multiplied(data: Data) -> None:
    table = next(node for node in data["nodes"] if node[2].endswith("embed_tokens"))
    node = ["call_function", "more", "operator.mul", [table[3][0], 3], {}, {}]
    data["nodes"].insert(data["nodes"].index(table), node)
    table[3][0] = {"node": "more"}


def test_ids_beyond_the_table_are_refused(folders: Path, tmp_path: Path) -> None:
    copy = crafted(folders, "static", tmp_path, multiplied)
    with pytest.raises(CheckpointError, match="rows 0 to 381 of a table of 128 rows"):
        fxquant.load(copy)


def test_positions_beyond_the_table_are_refused(tmp_path: Path) -> None:
    graph = fxquant.trace(gpt2())
    update_info(graph, max_positions=info(graph).max_positions + 1)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=r"rows 0 to \d+ of a table|cannot be computed"):
        fxquant.save(graph, tmp_path / "saved")


def test_an_id_beyond_the_vocabulary_is_one_error_of_a_call(folders: Path) -> None:
    graph = fxquant.load(folders / "groups")
    with pytest.raises(GraphCallError, match=r"ids .* 0 to 127"):
        graph(input_ids=torch.tensor([[1, 128]]))


@pytest.mark.parametrize(
    ("value", "message"), [(0.0, "other than 0"), (float("nan"), "finite"), (float("inf"), "fini")]
)
def test_an_inverse_scale_is_finite_and_not_0(value: float, message: str, tmp_path: Path) -> None:
    copy = tmp_path / "saved"
    text = "w8a8-dynamic+smooth(insert=true,where=all)"  # a GELU absorbs no scale
    fxquant.save(fxquant.convert(gpt2(), text, calibration=CALIBRATION), copy)
    assert any(isinstance(leaf, InverseScale) for leaf in fxquant.load(copy).modules())
    changed(copy, "values", fill(value))
    with pytest.raises(CheckpointError, match=rf"values: expected .*{message}"):
        fxquant.load(copy)


def compared(graph: GraphModule, ids: Tensor) -> None:
    """A model that compares sizes: ``x.shape[1] > 8``."""
    node = next(node for node in graph.graph.nodes if node.op == "placeholder")
    with graph.graph.inserting_after(list(graph.graph.nodes)[1]):
        size = graph.graph.call_method("size", (node, 1))
    with graph.graph.inserting_after(size):
        graph.graph.call_function(torch.gt, (size, 8))


def squared(graph: GraphModule, ids: Tensor) -> None:
    import operator

    node = next(node for node in graph.graph.nodes if node.op == "placeholder")
    with graph.graph.inserting_after(list(graph.graph.nodes)[1]):
        size = graph.graph.call_method("size", (node, 1))
    with graph.graph.inserting_after(size):
        graph.graph.call_function(operator.mul, (size, size))


def of_two_sizes(graph: GraphModule, ids: Tensor) -> None:
    for node in graph.graph.nodes:
        if is_op(node, OPS.quantize.default):
            node.update_arg(3, -7)


@pytest.mark.parametrize("change", [compared, squared, of_two_sizes])
def test_save_refuses_what_load_would(
    change: Callable[[GraphModule, Tensor], None], tmp_path: Path
) -> None:
    graph = fxquant.convert(opt(num_hidden_layers=1), "w8a8-static", calibration=CALIBRATION)
    fxquant.save(graph, tmp_path / "saved")
    change(graph, CALIBRATION[0])
    with pytest.raises(CheckpointError, match="the graph cannot be saved: "):
        fxquant.save(graph, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    fxquant.load(tmp_path / "saved")


MANIFESTS: dict[str, Callable[[Data], Any]] = {
    "huge version": lambda body: body.update(version=10**300),
    "version of text": lambda body: body.update(version="2"),
    "version true": lambda body: body.update(version=True),
    "version NaN": lambda body: body.update(version=float("nan")),
    "writer that obeys": lambda body: body.update(version=3, written_by="\x1b[2J"),
    "long writer": lambda body: body.update(version=3, written_by={"x": "y" * 9999}),
    "half a character": lambda body: body["files"].update({"\ud800": {"bytes": 1, "sha256": "a"}}),
    "a name that obeys": lambda body: body["files"].update({"\x1b": {"bytes": 1, "sha256": "a"}}),
    "a zero in a name": lambda body: body["files"].update({"a\0": {"bytes": 1, "sha256": "a"}}),
    "long name": lambda body: body["files"].update({"a" * 9999: {"bytes": 1, "sha256": "0" * 64}}),
    "size of text": lambda body: body["files"]["graph.json"].update(bytes="1"),
    "size NaN": lambda body: body["files"]["graph.json"].update(bytes=float("nan")),
    "huge size": lambda body: body["files"]["graph.json"].update(bytes=10**300),
    "no digest": lambda body: body["files"]["graph.json"].update(sha256=7),
    "a field more": lambda body: body.update(more=[[]]),
    "files as a list": lambda body: body.update(files=[{}]),
    "deep": lambda body: body.update(written_by=json.loads("[" * 500 + "]" * 500)),
}
MANIFEST_TEXTS = {
    "deep text": "[" * 100_000, "a key twice": '{"format": "fxquant", "format": "fxquant"}',
    "number of digits": '{"format": "fxquant", "version": ' + "9" * 5000 + "}", "list": "[]",
    "nothing": "", "bytes": "\x00\x01", "NaN": '{"format": "fxquant", "version": NaN}',
}  # fmt: skip


@pytest.mark.parametrize("name", [*MANIFESTS, *MANIFEST_TEXTS])
def test_a_manifest_of_odd_texts_is_one_error(name: str, folders: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders / "static", tmp_path / "copy"))
    body = json.loads((copy / MANIFEST).read_text())
    del body["sha256"]
    if name in MANIFESTS:
        MANIFESTS[name](body)
        (copy / MANIFEST).write_bytes(manifest._canonical(body))
    else:
        (copy / MANIFEST).write_text(MANIFEST_TEXTS[name])
    is_checkpoint(copy)
    with pytest.raises(CheckpointError) as error:
        fxquant.load(copy)
    said = str(error.value)
    assert str(copy) in said
    assert said.isprintable()
    assert len(said) < 700
    assert re.search(r"save or copy it again|upgrade fxquant|another program", said)


@pytest.mark.slow
def test_all_bases_of_the_mutations_are_saved_again(folders: Path, tmp_path: Path) -> None:
    """What loads saves, and loads again."""
    for name in SCHEMES:
        graph = fxquant.load(folders / name)
        fxquant.save(graph, tmp_path / name)
        ids = token_ids(1, 9)
        with torch.no_grad():
            assert torch.equal(fxquant.load(tmp_path / name)(input_ids=ids), graph(input_ids=ids))
