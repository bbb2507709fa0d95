"""Programs of torch.export: a process that knows torch alone gives the graph's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._inductor import cpp_builder
from torch.fx import GraphModule

import fxquant
from fxquant.errors import ExportError
from fxquant.exports import aoti, pt2, pt2_file
from fxquant.exports.pt2_file import MODEL
from fxquant.exports.pt2_program import exported as program_of
from fxquant.ir.operators import WRITTEN_OUT
from tests.models import SMALL_OPT
from tests.test_export_compressed import batches, tiny_llama
from tests.test_export_onnx import one_block

NORMAL = '{"scheme": "w8a8-dynamic-token", "overrides": {"*.mlp.*": "w4-g32-fp16-asym"}}'
SLOW = (
    "fp", "w8", "w8a8-static-asym", "w8a8-dynamic-token+attn8", "w4-g32/a8-dynamic-token", "nvfp4",
    "mxfp4", "fp8", "wnf4-g32", "w8+kv8", "w8+rotate",
)  # fmt: skip


def compare(scheme: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    model = one_block().to(dtype)
    graph = fxquant.convert(model, scheme, calibration=batches(model))
    exported = pt2(graph, folder)
    assert exported.checked.difference == 0
    assert "fresh process" in exported.checked.engine
    program = torch.export.load(exported.path / MODEL)
    assert not any("fxquant" in str(node.target) for node in program.graph.nodes)
    ids = torch.randint(3, 96, (3, 17))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        found = program.module()(input_ids=ids, attention_mask=mask)
        expected = graph(input_ids=ids, attention_mask=mask)
    assert torch.equal(found[mask.bool()], expected[mask.bool()])


def test_a_fresh_process_computes_the_same_bits(tmp_path: Path) -> None:
    compare(NORMAL, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SLOW)
def test_every_scheme(scheme: str, tmp_path: Path) -> None:
    compare(scheme, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    compare("w8a8-dynamic-token", tmp_path / "out", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4-g32", "w8a8-dynamic-token"])
def test_compiled(scheme: str, tmp_path: Path) -> None:
    found = aoti(one_block(), tmp_path / "out", scheme=scheme).checked
    assert found.difference <= found.allowed * found.largest
    assert ("moves the graph's own logits" in found.cause) is ("a8" in scheme)
    if scheme == "w4-g32":
        assert found.allowed == 1e-5


def test_compiling_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_there() -> str:
        raise torch._inductor.exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_there)
    with pytest.raises(ExportError, match=r"needs a C\+\+ compiler.*--to pt2, which needs none"):
        aoti(tiny_llama(), tmp_path / "out", scheme="w8")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_where_the_process_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(gm: GraphModule) -> torch.export.ExportedProgram:
        copy = fxquant.convert(one_block(), "w4")
        return program_of(copy)

    monkeypatch.setattr(pt2_file, "exported", damaged)
    with pytest.raises(ExportError, match=r"nothing is written.*largest difference"):
        pt2(one_block(), tmp_path / "out", scheme="w8")
    assert list(tmp_path.iterdir()) == []


def test_a_streamed_graph_is_refused(tmp_path: Path) -> None:
    streamed = fxquant.load_model(SMALL_OPT, streamed=True).graph
    with pytest.raises(ExportError, match="load it without stream"):
        pt2(streamed, tmp_path / "out", scheme="w8")
    assert list(tmp_path.iterdir()) == []


def test_every_operator_is_written_out() -> None:
    for name in WRITTEN_OUT:
        assert hasattr(torch.ops.fxquant, name)
