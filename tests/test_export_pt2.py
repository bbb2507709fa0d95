"""Programs of torch.export: a process that knows torch alone gives the graph's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import cpp_builder, exc
from torch.fx import GraphModule

import fxquant
from fxquant.errors import ExportError
from fxquant.exports import aoti, aoti_file, pt2, pt2_file, pt2_program
from fxquant.exports.check import ALLOWED
from fxquant.exports.pt2_file import MODEL
from fxquant.exports.pt2_program import exported as program_of
from fxquant.exports.pt2_program import of_any_size
from tests.architectures import llama
from tests.models import SMALL_OPT
from tests.test_export_compressed import batches, tiny_llama
from tests.test_export_onnx import one_block

PROCESSES: Any = vars(pt2_program)["subprocess"]  # what the check starts, faked here

NORMAL = '{"scheme": "w8a8-dynamic-token", "overrides": {"*.mlp.*": "w4-g32-fp16-asym"}}'
SLOW = (
    "fp", "w8", "w8a8-static-asym", "w8a8-dynamic-token+attn8", "w4-g32/a8-dynamic-token", "nvfp4",
    "mxfp4", "fp8", "wnf4-g32", "w8+kv8", "w8+rotate",
)  # fmt: skip


def compare(scheme: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    model = one_block().to(dtype)
    graph = fxquant.convert(model, scheme, calibration=batches(model))
    exported = pt2(graph, folder, scheme="fp" if scheme == "fp" else None)
    assert exported.checked.difference == 0
    assert "fresh process" in exported.checked.engine
    program = torch.export.load(exported.path / MODEL)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called
    assert not any("fxquant" in target for target in called)
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


def killed(*_: object, **__: object) -> Any:
    return PROCESSES.CompletedProcess([], -9, "", "")


def stuck(*_: object, **__: object) -> Any:
    raise PROCESSES.TimeoutExpired([], 1200)


@pytest.mark.parametrize(("run", "said"), [(killed, "signal 9"), (stuck, "not done in 1200 s")])
def test_a_process_without_an_answer(
    run: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PROCESSES, "run", run)
    with pytest.raises(ExportError, match=rf"cannot run model.pt2: .*{said}.*--no-check"):
        pt2_program._run("pt2", tmp_path / "model.pt2", [])


def test_torch_that_python_finds_only_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PYTHONPATH, which the fresh process leaves out; here Python is told of no packages at all."""
    start = PROCESSES.run

    def bare(command: list[str], **options: Any) -> Any:
        return start([command[0], "-S", *command[1:]], **options)

    monkeypatch.setattr(PROCESSES, "run", bare)
    x = torch.randn(3, 4)
    linear = torch.nn.Linear(4, 2)
    torch.export.save(torch.export.export(linear, (), {"input": x}), tmp_path / "linear.pt2")
    (found,) = pt2_program._run("pt2", tmp_path / "linear.pt2", [{"input": x}])
    assert torch.equal(found, linear(x))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_compiler_that_fails(
    wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        error = exc.CppCompileError(["g++"], "a.cpp:1: error: no such thing")
        raise exc.InductorError(error, None) if wrapped else error

    monkeypatch.setattr(aoti_file, "exported", lambda gm: None)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", failing)
    with pytest.raises(ExportError, match=r"does not compile: a.cpp:1: .* or take --to pt2"):
        aoti(one_block(), tmp_path / "out", scheme="w8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["w8a8-dynamic-token", "w8a8-static"])
def test_a_library_that_quantizes_nothing_is_noticed(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise moves some codes far; the float model's logits are off everywhere."""
    model = tiny_llama()
    floats = fxquant.convert(model, "fp")
    graph = fxquant.convert(model, scheme, calibration=batches(model))

    def of_floats(kind: str, file: Path, probes: list[dict[str, Tensor]]) -> list[Tensor]:
        with torch.no_grad():
            return [floats(**inputs) for inputs in probes]

    def of_other_roundings(kind: str, file: Path, probes: Any) -> list[Tensor]:
        with torch.no_grad():
            return [noisy(**inputs) for inputs in probes]

    monkeypatch.setattr(pt2_program, "_run", of_floats)
    found = pt2_program.elsewhere("aoti", tmp_path / MODEL, graph, True, "", "floats")
    assert not found.passed
    assert found.allowed == ALLOWED
    noisy = pt2_program._noisy(graph, 100)
    monkeypatch.setattr(pt2_program, "_run", of_other_roundings)
    assert pt2_program.elsewhere("aoti", tmp_path / MODEL, graph, True, "", "roundings").passed


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


def test_an_export_leaves_other_threads_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN is one switch for all threads: a program for any processor is made without it."""
    enabled: list[bool] = []

    def watched(gm: GraphModule) -> torch.export.ExportedProgram:
        enabled.append(bool(torch.backends.mkldnn.enabled))
        return of_any_size(gm)

    monkeypatch.setattr(pt2_program, "of_any_size", watched)
    graph = fxquant.convert(tiny_llama(), "w8a8-dynamic-token+attn8", level="integer")
    program = pt2_program.exported(graph)
    assert enabled == [bool(torch.backends.mkldnn.enabled)]
    targets = {str(node.target) for node in program.graph.nodes}
    assert not [name for name in targets if "int_mm" in name or "fxquant" in name]


def test_a_model_of_one_position() -> None:
    """Torch knows no length of any size of which the largest is 1."""
    graph = fxquant.convert(llama(max_position_embeddings=1), "w8", level="integer")
    ids = torch.randint(3, 128, (3, 1))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(program_of(graph).module()(**given), graph(**given))


def test_a_streamed_graph_is_refused(tmp_path: Path) -> None:
    streamed = fxquant.load_model(SMALL_OPT, streamed=True).graph
    with pytest.raises(ExportError, match="load it without stream"):
        pt2(streamed, tmp_path / "out", scheme="w8")
    assert list(tmp_path.iterdir()) == []
