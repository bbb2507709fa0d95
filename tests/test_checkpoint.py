"""Saved graphs: bit for bit, whole or refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule, Node
from transformers import PreTrainedModel

import fxquant
from fxquant.checkpoint.manifest import MANIFEST, VERSION, write_manifest
from fxquant.checkpoint.save_load import check_target
from fxquant.cli.main import main
from fxquant.errors import CheckpointError
from fxquant.evaluation import evaluate, load_text
from fxquant.frontends.tracing import trace
from fxquant.ir.graph import info, tag
from fxquant.recipes.repairs import REPAIRS
from tests.architectures import ARCHITECTURES, gpt2, llama, opt, padding_mask, token_ids
from tests.models import SMALL_OPT, small_opt

HEAD = '{"scheme": "w4-g16/a8-static-asym", "overrides": {"head": "w8", "embeddings": "w8"}}'
SCHEMES = ("fp32-gemm", HEAD)
MORE_SCHEMES = (
    "fp",
    "w8",
    "w8a8-dynamic-token",
    "w4-g16-asym",
    "w4/a4-dynamic",
    "w8a8-static",
    "w8a8-static-asym",
)
CALIBRATION = [token_ids(2, 12, seed=3)]
# A tied head, Conv1D, an embedding looked up by a function, a function of the model kept whole.
USUAL = ("opt", "gpt2", "gemma3", "gptj")
EACH = [
    name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES
]


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change graph.json as an attacker would: with checksums that fit again."""
    path = directory / "graph.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    (directory / MANIFEST).unlink()
    write_manifest(directory)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved static W8A8 graph of the small OPT, not to be written to."""
    model, tokenizer = small_opt()
    directory = tmp_path_factory.mktemp("checkpoint") / "saved"
    ids = torch.randint(2, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    qmodel = fxquant.convert(model, "w8a8-static", calibration=[ids])
    fxquant.save(qmodel, directory, tokenizer)
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def same_node(mine: Node, theirs: Node) -> bool:
    same = mine.op == theirs.op and mine.name == theirs.name and mine.target == theirs.target
    text = repr((mine.args, mine.kwargs)) == repr((theirs.args, theirs.kwargs))
    return same and text and tag(mine) == tag(theirs)


def assert_same_graph(before: GraphModule, after: GraphModule) -> None:
    assert info(after) == info(before)
    pairs = zip(before.graph.nodes, after.graph.nodes, strict=True)
    assert all(same_node(one, other) for one, other in pairs)
    old, new = (dict(gm.state_dict()) for gm in (before, after))
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert value.dtype == new[name].dtype
        assert torch.equal(value, new[name])
        assert value.stride() == new[name].stride()
    kinds = [[type(m) for _, m in gm.named_modules()][1:] for gm in (before, after)]
    assert sorted(map(str, kinds[0])) == sorted(map(str, kinds[1]))
    parameters = [{n for n, _ in gm.named_parameters()} for gm in (before, after)]
    assert parameters[0] == parameters[1]  # ties too: each is listed once


@pytest.mark.parametrize("architecture", EACH)
def test_round_trip_is_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    check_round_trips(ARCHITECTURES[architecture](), SCHEMES, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_of_more_schemes(architecture: str, tmp_path: Path) -> None:
    check_round_trips(ARCHITECTURES[architecture](), MORE_SCHEMES, tmp_path)


def check_round_trips(model: PreTrainedModel, schemes: tuple[str, ...], tmp_path: Path) -> None:
    graph = trace(model)
    inputs = {"input_ids": token_ids(3, 14), "attention_mask": padding_mask(3, 14, "both")}
    for number, scheme in enumerate(schemes):
        if (
            model.config.model_type == "gemma3_text"
        ):  # its embedding is looked up by a function: no site
            scheme = scheme.replace(', "embeddings": "w8"', "")
        before = fxquant.convert(graph, scheme, calibration=CALIBRATION)
        fxquant.save(before, tmp_path / str(number))
        after = fxquant.load(tmp_path / str(number))
        assert_same_graph(before, after)
        with torch.no_grad():
            assert torch.equal(before(**inputs), after(**inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_qdq(dtype: torch.dtype, tmp_path: Path) -> None:
    before = fxquant.convert(llama().to(dtype), "w4/a8-dynamic", level="qdq")
    fxquant.save(before, tmp_path / "saved")
    after = fxquant.load(tmp_path / "saved")
    assert_same_graph(before, after)
    assert torch.equal(before(input_ids=token_ids(1, 9)), after(input_ids=token_ids(1, 9)))


def test_streamed_load_reads_matrices_when_needed(saved: Path) -> None:
    ids = token_ids(2, 16)
    whole, streamed = fxquant.load(saved), fxquant.load(saved, stream=True)
    stored = dict(streamed.named_buffers())
    assert all(value.is_meta for value in stored.values() if value.dim() > 1)
    assert torch.equal(whole(input_ids=ids), streamed(input_ids=ids))


def test_a_streamed_graph_is_saved_as_it_was(saved: Path, tmp_path: Path) -> None:
    fxquant.save(fxquant.load(saved, stream=True), tmp_path / "again")
    assert_same_graph(fxquant.load(saved), fxquant.load(tmp_path / "again"))


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    fxquant.save(fxquant.convert(opt(), "w8"), tmp_path / "tied")
    loaded = fxquant.load(tmp_path / "tied")
    head = loaded.get_parameter("lm_head.weight")
    assert head is loaded.get_parameter("model.decoder.embed_tokens.weight")
    fxquant.save(fxquant.convert(opt(tie_word_embeddings=False), "w8"), tmp_path / "untied")
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
        for name in ("tied", "untied")
    ]
    assert sizes[1] - sizes[0] > 128 * 32 * 4 - 64  # the second matrix, give or take the header


@pytest.mark.parametrize("scheme", ["w8a8-dynamic-token", "w4-g128-asym"])
def test_size_on_disk_is_that_of_the_tensors(scheme: str, tmp_path: Path) -> None:
    """Tensors and graph, that is: the model's own config and tokenizer come on top."""
    model = llama(hidden_size=1024, intermediate_size=2816, vocab_size=512, num_hidden_layers=1)
    qmodel = fxquant.convert(model, scheme)
    _, tokenizer = small_opt()
    fxquant.save(qmodel, tmp_path / "saved", tokenizer)
    needed = sum(v.numel() * v.element_size() for v in qmodel.state_dict().values())
    ours = [tmp_path / "saved" / name for name in ("graph.json", MANIFEST)]
    ours += (tmp_path / "saved").glob("*.safetensors")
    found = sum(path.stat().st_size for path in ours)
    assert needed <= found <= 1.01 * needed


def test_config_and_tokenizer_stand_beside_it(saved: Path) -> None:
    model, tokenizer = small_opt()
    config = json.loads((saved / "config.json").read_text())
    assert config["hidden_size"] == model.config.hidden_size
    again = type(tokenizer).from_pretrained(saved)
    assert again("a sentence")["input_ids"] == tokenizer("a sentence")["input_ids"]


def test_loaded_onto_another_device(saved: Path) -> None:
    loaded = fxquant.load(saved, device="meta")
    assert {value.device.type for value in loaded.state_dict().values()} == {"meta"}


def test_saving_replaces_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "saved"
    fxquant.save(fxquant.convert(opt(), "w8"), target)
    fxquant.save(fxquant.convert(opt(), "w4"), target)
    assert info(fxquant.load(target)).scheme == "w4"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="exists and is not a checkpoint"):
        fxquant.save(fxquant.convert(opt(), "w8"), tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "saved"]


def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxquant.checkpoint.save_load.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxquant.save(fxquant.convert(opt(), "w8"), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_unknown_targets_are_refused_by_save(tmp_path: Path) -> None:
    qmodel = fxquant.convert(opt(), "w8")
    node = next(n for n in qmodel.graph.nodes if n.op == "call_function")
    with qmodel.graph.inserting_after(node):
        qmodel.graph.call_function(breakpoint, (), name="stranger")
    with pytest.raises(CheckpointError, match=r"node stranger: target 'builtins\.breakpoint'"):
        fxquant.save(qmodel, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_unknown_modules_are_refused_by_save(tmp_path: Path) -> None:
    class Mine(nn.Linear):
        pass

    qmodel = fxquant.convert(opt(), "fp")
    qmodel.add_submodule("model.decoder.layers.0.fc1", Mine(32, 64))
    with pytest.raises(CheckpointError, match=r"model\.decoder\.layers\.0\.fc1: .*Mine"):
        fxquant.save(qmodel, tmp_path / "saved")


def test_observed_graphs_are_refused_by_save(tmp_path: Path) -> None:
    observed = fxquant.convert(opt(), "w8a8-static", calibration=CALIBRATION, level="observed")
    with pytest.raises(CheckpointError, match="HistogramObserver"):
        fxquant.save(observed, tmp_path / "saved")


def test_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a graph saved by fxquant"):
        fxquant.load(tmp_path / "nothing")
    opt().save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="not a graph saved by fxquant"):
        fxquant.load(tmp_path / "hf")
    (tmp_path / "hf" / MANIFEST).write_text('{"format": "else", "files": {}}')
    with pytest.raises(CheckpointError, match="another program"):
        fxquant.load(tmp_path / "hf")


def test_newer_versions_are_named(copy: Path) -> None:
    body = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**body, "version": VERSION + 1}))
    said = f"format version {VERSION + 1}, this fxquant reads up to {VERSION}"
    with pytest.raises(CheckpointError, match=said):
        fxquant.load(copy)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_changed_byte_is_noticed(copy: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(p for p in copy.iterdir())))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    flipped = content[place] ^ (1 << data.draw(st.integers(0, 7)))
    path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
    try:
        with pytest.raises(CheckpointError):
            fxquant.load(copy)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_any_truncated_or_missing_file_is_noticed(copy: Path, share: float) -> None:
    for path in sorted(copy.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError, match=path.name if path.name != MANIFEST else "."):
            fxquant.load(copy)
        path.unlink()
        with pytest.raises(CheckpointError):
            fxquant.load(copy)
        path.write_bytes(content)
    fxquant.load(copy)


def _first(data: dict[str, Any], op: str) -> list[Any]:
    return next(node for node in data["nodes"] if node[0] == op)


def _set(op: str, field: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        _first(data, op)[field] = value

    return change


def _kind(data: dict[str, Any]) -> None:
    data["modules"]["lm_head"]["kind"] = "Popen"


def _class_name(data: dict[str, Any]) -> None:
    data["class_name"] = "X:\n  import os\nclass Y"


def _keyword(data: dict[str, Any]) -> None:
    _first(data, "call_function")[4] = {"x=print('ran'), y": 1}


def _getattr(data: dict[str, Any]) -> None:
    node = _first(data, "call_function")
    node[2], node[3], node[4] = "getattr", [node[3][0], "__class__"], {}


def _chunk(data: dict[str, Any]) -> None:
    node = next(n for n in data["nodes"] if n[2] == "fxquant.int_gemm.default")
    node[3][2] = 4096


def _missing(data: dict[str, Any]) -> None:
    del data["modules"]["lm_head"]


def _info(data: dict[str, Any]) -> None:
    data["info"]["level"] = "float"


def _dunder(data: dict[str, Any]) -> None:
    leaf = _first(data, "call_module")[2]
    _first(data, "get_attr")[2] = f"{leaf}.__dict__"


def _builtins(data: dict[str, Any]) -> None:
    """From a method's globals to exec, which becomes a leaf's forward."""
    leaf, provenance = _first(data, "call_module")[2], _first(data, "call_function")[5]
    put = [{"node": "parts"}, "forward", {"node": "run"}]
    chain: list[list[Any]] = [
        ["get_attr", "found", "register_buffer.__builtins__", [], {}, provenance],
        ["call_function", "run", "operator.getitem", [{"node": "found"}, "exec"], {}, provenance],
        ["get_attr", "parts", f"{leaf}.__dict__", [], {}, provenance],
        ["call_function", "put", "operator.setitem", put, {}, provenance],
        ["call_module", "called", leaf, ["raise SystemExit('ran')"], {}, provenance],
    ]
    at = next(i for i, node in enumerate(data["nodes"]) if node[0] != "placeholder")
    data["nodes"][at:at] = chain


def _container(data: dict[str, Any]) -> None:
    _first(data, "call_module")[2] = "no.such.leaf"


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "os.system": (_set("call_function", 2, "os.system"), "'os.system'"),
    "posix.system": (_set("call_function", 2, "posix.system"), "'posix.system'"),
    "eval": (_set("call_function", 2, "builtins.eval"), "'builtins.eval'"),
    "method": (_set("call_method", 2, "__reduce__"), "'__reduce__'"),
    "path": (_set("get_attr", 2, "a.b'); import os; ('"), "import os"),
    "module's dict": (_dunder, "'__dict__' in the path"),
    "builtins": (_builtins, "'register_buffer' in the path"),
    "no leaf": (_container, r"'no\.such\.leaf' of a call_module is no module"),
    "reserved word": (
        lambda data: _first(data, "call_function")[4].update({"class": 1}),
        "no operation has an argument 'class'",
    ),
    "name": (_set("call_function", 1, "x = 1; import os"), "not an identifier"),
    "input": (_set("placeholder", 2, "x=print(1)"), "placeholder"),
    "op": (_set("call_method", 0, "exec"), "unknown kind of node"),
    "type": (_set("placeholder", 3, [{"dtype": "float31"}]), "float31"),
    "module": (_kind, "'Popen'"),
    "class name": (_class_name, "class name"),
    "keyword": (_keyword, "no operation has an argument"),
    "getattr": (_getattr, "__class__"),
    "chunk": (_chunk, "chunk 4096"),
    "missing module": (_missing, "nothing reads|lm_head"),
    "level": (_info, "records of codes at level float"),
    "shape of the file": (lambda data: data.pop("nodes"), "does not hold exactly"),
    "node": (lambda data: data["nodes"].insert(3, []), "node 3 is not"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_from_the_file_is_executed(copy: Path, name: str) -> None:
    change, message = ATTACKS[name]
    rewrite(copy, change)
    with pytest.raises(CheckpointError, match=message):
        fxquant.load(copy)


def test_a_certificate_that_does_not_hold_is_refused(tmp_path: Path) -> None:
    model = llama(hidden_size=64, intermediate_size=2080)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight.fill_(1.0)  # every code is 127: 2080 * 127 * 127 > 2**24
    qmodel = fxquant.convert(model, "w8a8-dynamic")
    fxquant.save(qmodel, tmp_path / "saved")
    assert info(fxquant.load(tmp_path / "saved")) == info(qmodel)

    def change(data: dict[str, Any]) -> None:
        for node in data["nodes"]:
            if node[2] == "fxquant.int_gemm.default":
                node[3][2] = 0

    rewrite(tmp_path / "saved", change)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj: .*may overflow"):
        fxquant.load(tmp_path / "saved")


def test_manifest_outside_its_folder_is_refused(copy: Path) -> None:
    outside = copy.parent / "outside"
    outside.write_text("x")
    body = json.loads((copy / MANIFEST).read_text())
    digest = hashlib.sha256(b"x").hexdigest()
    body.pop("sha256")
    body["files"]["../outside"] = {"bytes": 1, "sha256": digest}
    text = json.dumps(body, indent=1, sort_keys=True)
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (copy / MANIFEST).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    with pytest.raises(CheckpointError, match="outside"):
        fxquant.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(files=[]), "lists no files"),
        (lambda body: body.pop("files"), "does not hold exactly files"),
        (lambda body: body["files"]["graph.json"].pop("sha256"), "no size and checksum of graph"),
        (lambda body: body["files"].update({"graph.json": None}), "no size and checksum of graph"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    body = json.loads((copy / MANIFEST).read_text())
    body.pop("sha256")
    change(body)
    text = json.dumps(body, indent=1, sort_keys=True)
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (copy / MANIFEST).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    with pytest.raises(CheckpointError, match=message):
        fxquant.load(copy)


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(CheckpointError, match="cannot write"):
        check_target(file / "saved")
    command = ["convert", "--model", "no/such", "--scheme", "w8", "--output", str(file / "saved")]
    assert main(command) == 2


def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxquant.checkpoint.save_load.save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left"):
        fxquant.save(fxquant.convert(opt(), "w8"), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_evaluate_takes_a_saved_graph(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--windows", "2", "--length", "48", "--calibration-windows", "0"]
    assert main(["evaluate", "--model", str(saved), *short, "--output", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["scheme"] == "w8a8-static"
    assert table.splitlines()[2].split("|")[4].strip() == "-"  # no float model to compare with
    _, tokenizer = small_opt()
    ids = tokenizer(load_text("builtin").evaluation)["input_ids"][:96]
    measured = evaluate(fxquant.load(saved), torch.tensor(ids).view(2, 48))
    assert row["loss"] == measured.loss
    assert main(["evaluate", "--model", str(saved), *short, "--stream"]) == 0
    assert f"{row['loss']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--schemes", "w8"], "quantized already (scheme w8a8-static, level"),
        (["--dtype", "float16"], "its dtype is part of it"),
    ],
)
def test_evaluate_says_what_a_saved_graph_does_not_take(
    saved: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--model", str(saved), *options]) == 2
    assert message in capsys.readouterr().err


def test_evaluate_needs_schemes_for_a_float_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", str(SMALL_OPT)]) == 2
    assert "give --schemes" in capsys.readouterr().err


def test_evaluate_needs_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fxquant.save(fxquant.convert(opt(), "w8"), tmp_path / "saved")
    assert main(["evaluate", "--model", str(tmp_path / "saved")]) == 2
    assert "holds no tokenizer" in capsys.readouterr().err


def test_convert_saves_streamed_or_not_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["convert", "--model", str(SMALL_OPT), "--scheme", "w8a8-static+smooth"]
    options += ["--length", "48", "--calibration-windows", "2", "--output"]
    assert main([*options, str(tmp_path / "whole")]) == 0
    assert f"written to {tmp_path / 'whole'}" in capsys.readouterr().out
    assert main([*options, str(tmp_path / "streamed"), "--stream"]) == 0
    one, other = (fxquant.load(tmp_path / name) for name in ("whole", "streamed"))
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_convert_checks_its_output_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    command = ["convert", "--model", "nobody/nothing", "--scheme", "w8", "--output"]
    assert main([*command, str(tmp_path)]) == 2
    assert "is not a checkpoint of fxquant" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "new"), "--level", "observed"]) == 2
    assert "an observed graph holds statistics" in capsys.readouterr().err


# What a repair needs on a tiny random model so that it has an effect.
OPTIONS = {"split_outliers": "(threshold=2.5)"}


@pytest.mark.parametrize("architecture", ["opt", "llama"])
@pytest.mark.parametrize("repair", REPAIRS)
def test_every_repair_round_trips(repair: str, architecture: str, tmp_path: Path) -> None:
    """A new repair whose modules or functions the format does not know fails here."""
    model = {"opt": opt, "llama": llama}[architecture](num_hidden_layers=1)
    scheme = f"w4-g16/a8-static:absmax+{repair}{OPTIONS.get(repair, '')}"
    check_round_trips(model, (scheme,), tmp_path)


@pytest.mark.parametrize("repair", ["equalize", "awq", "rotate"])
def test_repaired_float_graphs_round_trip(repair: str, tmp_path: Path) -> None:
    repaired = fxquant.convert(llama(), f"w4-g16+{repair}", calibration=CALIBRATION, level="float")
    fxquant.save(repaired, tmp_path / "saved")
    assert_same_graph(repaired, fxquant.load(tmp_path / "saved"))


@pytest.mark.parametrize("scheme", ["w8a8-static+smooth+attn8", "w4-g16+awq+gptq"])
def test_repairs_of_conv1d_round_trip(scheme: str, tmp_path: Path) -> None:
    check_round_trips(gpt2(), (scheme,), tmp_path)
