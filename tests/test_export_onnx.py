"""ONNX models: what stands in them, and that ONNX Runtime computes the graph's logits and codes."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fxquant
from fxquant.errors import ExportError
from fxquant.exports.onnx_file import MODEL
from fxquant.exports.onnx_file import onnx as export
from fxquant.exports.onnx_prepare import prepared, shift_of
from fxquant.exports.sites import coded_sites
from fxquant.formats.integer import integer
from tests.architectures import ARCHITECTURES, build, gpt2, randomize
from tests.models import small_opt
from tests.more_architectures import DENSE
from tests.test_export_compressed import Untouched, batches, fresh_tokens

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
RUNTIME = pytest.mark.needs_program(
    all(find_spec(name) for name in PACKAGES), f"{', '.join(PACKAGES)}, of the exports extra"
)


def one_block() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = build(LlamaForCausalLM, config)
    randomize(model, 3)
    return model


def run(folder: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """Apart from the export's own check."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(folder / MODEL, options)
    given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    return torch.from_numpy(session.run(["logits"], given)[0])


def operators(folder: Path) -> Counter[str]:
    import onnx

    return Counter(node.op_type for node in onnx.load(folder / MODEL).graph.node)


NORMAL = (
    '{"scheme": "w4-g32-asym", "overrides": {"embeddings": "w4-g32", "*.o_proj": "w8a8-static", '
    '"*.k_proj": "w4-g24", "*.down_proj": "w8-g64-asym"}}',
)
SLOW = (
    "fp", "w8", "w4", "w3-asym", "w8/a5-dynamic-token", "w8-tensor", "w4-g32", "w8a8-static",
    "w8a8-static-asym", "w4-g7", "w3-g40-asym",
    "w8a8-dynamic", "w8a8-dynamic-token", "w8-asym/a8-dynamic-token", "w4/a8-dynamic-token",
    "w8a8-dynamic-token-asym", "w8a8-dynamic-token+attn8", "w8a8-static+attn8", "w4-g32+gptq",
    "w8a8-static+smooth(alpha=0.7,where=all)", "w8+rotate", "w8+correct_bias",
)  # fmt: skip


def compare(model: PreTrainedModel, scheme: str, folder: Path) -> Any:
    graph = fxquant.convert(model, scheme, calibration=batches(model))
    exported = export(graph, folder, scheme="fp") if scheme == "fp" else export(graph, folder)
    found = exported.checked
    assert found.under_rules <= 1e-5 * found.largest
    if "differ" in found.cause:
        return exported
    ids = fresh_tokens(model)
    for batch in (ids, ids[:1, :1], ids.repeat(2, 1)[:3, :9]):
        mask = torch.ones_like(batch)
        mask[0, : batch.shape[1] // 3] = 0
        with torch.no_grad():
            expected = graph(input_ids=batch, attention_mask=mask)[mask.bool()]
        apart = (run(exported.path, batch, mask)[mask.bool()] - expected).abs()
        # A code at the edge moves single logits; rounding moves none by more than this.
        assert float(apart.median()) <= 1e-6 * float(expected.abs().max())
    return exported


@RUNTIME
@pytest.mark.parametrize("scheme", NORMAL)
def test_logits_and_codes_are_the_graphs(scheme: str, tmp_path: Path) -> None:
    compare(one_block(), scheme, tmp_path / "out")


@RUNTIME
@pytest.mark.slow
@pytest.mark.parametrize("which", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("scheme", SLOW)
def test_every_scheme(which: str, scheme: str, tmp_path: Path) -> None:
    model = {"llama": one_block(), "opt": small_opt()[0], "gpt2": gpt2()}[which]
    compare(model, scheme, tmp_path / "out")


@RUNTIME
def test_what_stands_in_the_model(tmp_path: Path) -> None:
    import onnx

    model = one_block()
    scheme = {"scheme": "w8a8-dynamic-token-asym", "overrides": {"*.self_attn.*": "w4-g32"}}
    exported = export(model, tmp_path / "out", scheme=scheme)
    found = onnx.load(exported.path / MODEL)
    kinds = operators(exported.path)
    assert kinds["MatMulInteger"] == 3
    assert kinds["DequantizeLinear"] == 4
    assert [entry.version for entry in found.opset_import] == [21]
    names = {node.name for node in found.graph.node}
    assert "model.layers.0.mlp.down_proj/MatMulInteger" in names
    assert "model.layers.0.self_attn.q_proj/DequantizeLinear" in names
    stored = {tensor.name: tensor for tensor in found.graph.initializer}
    four = stored["model.layers.0.self_attn.q_proj.codes"]
    assert four.data_type == onnx.TensorProto.INT4
    assert list(four.dims) == [64, 64]
    assert len(four.raw_data) == 64 * 64 // 2
    assert stored["model.layers.0.mlp.up_proj.codes"].data_type == onnx.TensorProto.UINT8


def test_no_pair_of_products_saturates() -> None:
    """As x86 without VNNI adds two of an unsigned by a signed byte, in 16 bits."""
    for bits in range(2, 9):
        pair = 2 * 255 * integer(bits, symmetric=False).codes[0]
        assert (shift_of(bits) == 0) == (pair >= -(2**15))
    model = one_block()
    for scheme, kind in (("w8a8-static", torch.uint8), ("w4a8-static", torch.int8)):
        graph = fxquant.convert(model, scheme, calibration=batches(model), level="integer")
        copy = prepared(graph)
        for site in coded_sites(graph):
            assert copy.get_submodule(site.path).get_buffer("codes").dtype == kind
        ids = fresh_tokens(model)
        assert torch.equal(copy(input_ids=ids), graph(input_ids=ids))


@RUNTIME
def test_a_query_that_attends_to_nothing(tmp_path: Path) -> None:
    """In rows of padding, and where a sliding window lies in it: what a range over all tokens
    would see."""
    model = ARCHITECTURES["mistral"]()
    graph = fxquant.convert(model, "fp")
    exported = export(graph, tmp_path / "out", scheme="fp")
    ids = torch.randint(3, 128, (4, 19))
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, 5:], mask[2] = 0, 0, 0
    with torch.no_grad():
        expected = graph(input_ids=ids, attention_mask=mask)
    found = run(exported.path, ids, mask)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@RUNTIME
def test_bfloat16_inside_a_model_of_float32(tmp_path: Path) -> None:
    """Falcon's ALiBi, whose products ONNX Runtime does not compute in bfloat16."""
    exported = export(DENSE["falcon-alibi"](), tmp_path / "out", scheme="w8a8-dynamic")
    assert exported.checked.passed
    assert "codes of inputs" in exported.checked.cause


@RUNTIME
def test_a_model_of_another_dtype_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = one_block().bfloat16()
    exported = export(
        model, tmp_path / "out", scheme="w8a8-static+attn8", calibration=batches(model)
    )
    assert "in float32 (its own floats are bfloat16)" in exported.checked.cause
    assert not [each for each in caplog.records if each.levelname != "DEBUG"]


@RUNTIME
def test_what_has_no_form_in_onnx_is_one_error(tmp_path: Path) -> None:
    graph = fxquant.convert(one_block(), "w8", level="integer")
    (output,) = graph.graph.find_nodes(op="output")
    with graph.graph.inserting_before(output):
        new = graph.graph.call_function(torch.special.bessel_j0, (output.args[0],))
    new.meta = dict(output.args[0].meta)
    output.args = (new,)
    graph.recompile()
    with pytest.raises(ExportError, match=r"no form in ONNX .*bessel_j0.*--to pt2"):
        export(graph, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@RUNTIME
def test_a_damaged_model_is_one_error(tmp_path: Path) -> None:
    from fxquant.exports.onnx_check import session

    (tmp_path / MODEL).write_bytes(b"\x08no model")
    with pytest.raises(ExportError, match=r"ONNX Runtime does not load .*model.onnx.*export again"):
        session(tmp_path / MODEL)


@RUNTIME
def test_nothing_is_written_where_the_engine_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what it is written from is wrong, which the check must not share."""
    from fxquant.exports import onnx_check, onnx_file

    def damaged(graph: GraphModule) -> GraphModule:
        copy = prepared(graph)
        site = copy.get_submodule("model.layers.0.mlp.up_proj")
        site.register_buffer("scale", site.get_buffer("scale") * (1 + 5e-5))  # not in place: shared
        return copy

    for module in (onnx_file, onnx_check):
        monkeypatch.setattr(module, "prepared", damaged)
    with pytest.raises(ExportError, match=r"nothing is written.*up_proj/y is off by"):
        export(one_block(), tmp_path / "out", scheme="w8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["w8a8-static-asym", "w4-g32-asym", "w8-tensor-asym"])
def test_the_prepared_graph_computes_the_same(scheme: str) -> None:
    """Without any engine: transposed weights, unpacked, in one operator a site."""
    model = one_block()
    graph = fxquant.convert(model, scheme, calibration=batches(model))
    copy = prepared(graph)
    assert len(list(coded_sites(graph))) == 7
    ids = fresh_tokens(model)
    with torch.no_grad():
        expected, found = graph(input_ids=ids), copy(input_ids=ids)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


REFUSED = {
    '{"scheme": "w8", "overrides": {"embeddings": "w4-g7"}}': (
        "groups of 7 do not divide its 64 columns",
        "w4-g4",
    ),
    "w8+kv8": ("cache", "without +kv8"),
    "w4-g32/a8-dynamic-token": ("no scale for each group", "w4a8-dynamic-token"),
}


@RUNTIME
@pytest.mark.parametrize("scheme", REFUSED)
def test_refused_before_work(scheme: str, tmp_path: Path) -> None:
    model = one_block()
    with pytest.raises(ExportError) as refused:
        export(model, tmp_path / "out", scheme=scheme, calibration=Untouched(batches(model)))
    for part in REFUSED[scheme]:
        assert part in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@RUNTIME
def test_codes_are_counted_where_they_differ_and_held_to_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By codes that the engine is said to have: one moved by a step is counted, by two refused."""
    from fxquant.exports.onnx_check import Shown, check

    graph = fxquant.convert(one_block(), "w8a8-dynamic-token", level="integer")
    exported = export(graph, tmp_path / "out", check=False)
    run, steps = Shown.run, 1

    def moved(self: Shown, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[Any, Tensor]]:
        logits, found = run(self, ids, mask)
        codes = found[next(iter(self.codes))]
        place = codes.flatten().abs().argmin()  # of no end, so that the step is another code
        codes.view(-1)[place] += steps
        return logits, found

    monkeypatch.setattr(Shown, "run", moved)
    found = check(graph, exported.path / MODEL)
    assert "codes of inputs differ" in found.cause
    # What follows from it is no longer the engine's: the site behind it is named.
    assert not found.passed
    assert "rescaled is off by" in found.cause
    steps = 2
    assert "codes differ by up to 2" in check(graph, exported.path / MODEL).cause


@RUNTIME
def test_weights_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch writes them where a model nears what a protobuf may hold, 2 GB; here from 4 KB."""
    import onnx
    import torch.onnx._internal.exporter._onnx_program as program

    monkeypatch.setattr(program, "_LARGE_MODEL_THRESHOLD", 4096)
    exported = export(one_block(), tmp_path / "out", scheme="w4-g32")
    assert exported.checked.passed
    assert exported.checked.engine
    found = onnx.load(exported.path / MODEL, load_external_data=False)
    beside = {
        entry.value
        for tensor in found.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert beside
    assert all((exported.path / name).is_file() for name in beside)
    assert not [path for path in exported.path.iterdir() if path.stem in ("shown", "inferred")]
