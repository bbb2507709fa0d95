"""What exports write while there is no room: one error, never half a file that looks whole."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from torch._inductor import cpu_vec_isa
from transformers import PreTrainedTokenizerFast

import fxquant
from fxquant.errors import CheckpointError, ExportError, FxquantError, WriteError
from fxquant.exports import aoti, compressed_tensors, gguf
from fxquant.exports.aoti_file import _forget_instructions
from fxquant.exports.gguf_file import MODEL
from fxquant.exports.pt2_program import _run
from fxquant.files.native_writers import held_errors
from fxquant.files.temporary import temporary_folder
from tests.architectures import token_ids
from tests.attack.test_disk import file_limit, small_disk
from tests.hub_format import character_tokenizer
from tests.test_export_compressed import tiny_llama

READER = pytest.mark.needs_program(find_spec("gguf"), "gguf, of the exports extra")
ONNX = pytest.mark.needs_program(
    find_spec("onnxruntime") and find_spec("onnx"), "onnx and onnxruntime, of the exports extra"
)


def large_tokenizer() -> PreTrainedTokenizerFast:
    """Its tokenizer.json has 300 kB, more than a tiny model's other files."""
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("z" * 300_000, "")
    return tokenizer


def _saved(graph: Any, folder: Path) -> None:
    fxquant.save(graph, folder, large_tokenizer())


def _exported(graph: Any, folder: Path) -> None:
    compressed_tensors(graph, folder, tokenizer=large_tokenizer(), check=False)


@pytest.mark.parametrize(("write", "kind"), [(_saved, CheckpointError), (_exported, ExportError)])
def test_a_tokenizer_that_does_not_fit_is_one_error(
    write: Callable[[Any, Path], None], kind: type[FxquantError], tmp_path: Path
) -> None:
    graph = fxquant.convert(tiny_llama(), "w8", level="qdq")
    with (
        file_limit(200_000),
        pytest.raises(kind, match=f"cannot write {tmp_path}/out: .*too large"),
    ):
        write(graph, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    write(graph, tmp_path / "out")


@READER
def test_a_gguf_file_is_whole_or_an_error(tmp_path: Path) -> None:
    def digest() -> str:
        return hashlib.sha256((tmp_path / "out" / MODEL).read_bytes()).hexdigest()

    model = tiny_llama()
    gguf(model, tmp_path / "out", scheme="w8-g32-fp16", check=False)
    whole, size = digest(), (tmp_path / "out" / MODEL).stat().st_size
    for less in (1, 33, 500, 3000, 6000, size // 2):
        with file_limit(size - less), pytest.raises(ExportError, match=r"cannot write .*too large"):
            gguf(model, tmp_path / "out", scheme="w8-g32-fp16", check=False)
        assert digest() == whole
    with file_limit(size):
        gguf(model, tmp_path / "out", scheme="w8-g32-fp16", check=False)
    assert digest() == whole


@pytest.mark.parametrize("limit", [0, 1, 5000, 60_000, 100_000])
def test_archives_of_torch_end_with_an_error_not_with_the_process(
    limit: int, tmp_path: Path
) -> None:
    layer = torch.nn.Linear(160, 160)
    given = (torch.rand(2, 160),)
    program = torch.export.export(layer, given)
    path = tmp_path / "model.pt2"
    kept: Any
    for save, kept in ((torch.export.save, program), (torch.save, layer.state_dict())):
        with (
            file_limit(limit),
            pytest.raises(OSError, match="too large"),
            held_errors(path) as file,
        ):
            save(kept, file)
    with held_errors(path) as file:
        torch.export.save(program, file)
    assert torch.equal(torch.export.load(path).module()(*given), layer(*given))


def test_what_fails_beside_a_write_keeps_its_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held_errors(tmp_path / "x") as file:
        file.write(b"%d" % (1 // (file.write(b"abc") - 3)))
    assert (tmp_path / "x").read_bytes() == b"abc"
    with pytest.raises(FileNotFoundError), held_errors(tmp_path / "no" / "x"):
        pass


@ONNX
def test_a_copy_for_the_check_that_does_not_fit(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    from fxquant.exports.onnx_check import _beside

    x, y = (helper.make_tensor_value_info(name, TensorProto.UINT8, [1]) for name in "xy")
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]))
    onnx.save(model, tmp_path / "model.onnx")
    with file_limit(10), pytest.raises(ExportError, match=r"shown.onnx, a copy.*--no-check"):
        _beside(tmp_path / "model.onnx", model)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx"}


def test_a_temporary_folder_without_room_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = [{"input_ids": token_ids(1, 8)}]
    with file_limit(100), pytest.raises(ExportError, match=r"given.pt: File too large; .*TMPDIR"):
        _run("pt2", tmp_path / "model.pt2", probes)
    graph = fxquant.convert(tiny_llama(), "w8", level="qdq")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(WriteError, match=f"{tmp_path}/gone/fxquant-.*TMPDIR"):
        temporary_folder("results lie there").__enter__()
    with pytest.raises(ExportError, match=f"{tmp_path}/gone/fxquant-.*config.*TMPDIR"):
        compressed_tensors(graph, tmp_path / "out", check=False)
    with pytest.raises(ExportError, match=f"{tmp_path}/gone/fxquant-.*TMPDIR"):
        _run("pt2", tmp_path / "model.pt2", probes)
    assert not list(tmp_path.iterdir())


@pytest.mark.needs_program(shutil.which("g++"), "a C++ compiler")
@pytest.mark.parametrize("options", [pytest.param("", marks=pytest.mark.slow), ",ro"])
def test_a_compiler_without_room_for_its_files(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    graph = fxquant.convert(tiny_llama(), "w8")
    _forget_instructions()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(disk / "cache"))
    said = rf"compiler cannot write its own files: .*; they lie in {disk}/cache.*TMPDIR"
    with small_disk(disk, "64k", options), pytest.raises(ExportError, match=said):
        aoti(graph, tmp_path / "out", check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]
    monkeypatch.undo()
    found = str(cpu_vec_isa.pick_vec_isa())
    _forget_instructions()
    assert str(cpu_vec_isa.pick_vec_isa()) == found  # what is compiled next has lost nothing
