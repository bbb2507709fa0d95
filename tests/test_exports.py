"""What all exports share: the folder, its shards, refusals and the command line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

import fxquant
from fxquant.checkpoint.target import held_target
from fxquant.cli.main import main
from fxquant.errors import ExportError, SchemeError
from fxquant.exports import compressed_tensors
from fxquant.exports.folder import RECORD
from fxquant.exports.shards import write_shards
from fxquant.exports.table import FORMATS
from fxquant.frontends.weight_files import safetensors_weights
from tests.kills import killed
from tests.models import SMALL_OPT
from tests.test_export_compressed import tiny_llama

SHORT = ["--length", "48", "--calibration-windows", "2"]


def exported(folder: Path, scheme: str = "w8") -> Path:
    return compressed_tensors(tiny_llama(), folder, scheme=scheme, check=False).path


def test_the_record_says_what_it_is(tmp_path: Path) -> None:
    record = json.loads((exported(tmp_path / "out", "w4-g32") / RECORD).read_text())
    assert record["target"] == "compressed-tensors"
    assert record["scheme"] == "w4-g32"
    assert record["written_by"]["torch"] == importlib.metadata.version("torch")
    assert record["checked"]["skipped"] == "as asked"


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out", "w8")
    before = set(load_file(folder / "model.safetensors"))
    (folder / "of_the_old_one").write_text("x")
    exported(tmp_path / "out", "w8-asym")
    assert before < set(load_file(folder / "model.safetensors"))
    assert not (folder / "of_the_old_one").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep")
    with pytest.raises(ExportError, match="is not an export of fxquant"):
        exported(tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        with pytest.raises(ExportError, match="file"):
            exported(tmp_path / place)
    assert (tmp_path / "mine" / "note.txt").read_text() == "keep"


def test_a_pipe_in_the_place_of_a_record_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / RECORD)
    with pytest.raises(ExportError, match="is not an export of fxquant"):
        exported(tmp_path / "out")


KILLED = {  # where a process ends, and the file that it has begun by then
    "compressed-tensors": ("fxquant.exports.compressed_file.site_tensors", "config.json"),
    "onnx": ("onnx.checker.check_model", "model.onnx"),
    "gguf": ("gguf.GGUFWriter.write_tensor_data", "model.gguf"),
}


@pytest.mark.parametrize("name", KILLED)
def test_a_kill_leaves_nothing_that_stays(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in FORMATS[name].target.packages:
        if not find_spec(package):
            pytest.skip(f"not installed: {package}")

    def killing(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def export() -> None:
        FORMATS[name].export(tiny_llama(), tmp_path / "out", scheme="w8-g32-fp16", check=False)

    place, begun = KILLED[name]
    with monkeypatch.context() as patched:
        patched.setattr(place, killing)
        assert killed(export, after=300)
    assert [path.name for path in tmp_path.glob(".out.partial-*/*")] == [begun]
    assert not (tmp_path / "out").exists()
    export()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / begun).exists()


def test_shards_have_an_index(tmp_path: Path) -> None:
    tensors = {f"part.{number}": torch.randn(100 + number) for number in range(7)}
    write_shards(tmp_path, iter(tensors.items()), limit=1000)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert len(names) == 4
    found = safetensors_weights(tmp_path)
    assert all(torch.equal(found[name].read(), value) for name, value in tensors.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * v.numel() for v in tensors.values())


def test_one_shard_has_none(tmp_path: Path) -> None:
    write_shards(tmp_path, iter({"a": torch.randn(3)}.items()))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_source(name: str, tmp_path: Path) -> None:
    if name == "onnx" and not find_spec("onnxscript"):
        pytest.skip("not installed: onnxscript")
    export, model = FORMATS[name].export, tiny_llama()
    with pytest.raises(SchemeError, match="pass scheme="):
        export(model, tmp_path / "out")
    with pytest.raises(SchemeError, match="quantized already"):
        export(fxquant.convert(model, "w8"), tmp_path / "out", scheme="w4")
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(SMALL_OPT)]
    to = ["export", "--to", "compressed-tensors", "--no-check"]
    assert main([*to, *model, "--scheme", "w8a8-static", *SHORT, "--output", f"{tmp_path}/a"]) == 0
    printed = capsys.readouterr().out
    assert "not checked: as asked" in printed
    assert f"written to {tmp_path}/a (compressed-tensors)" in printed
    assert (tmp_path / "a" / "tokenizer.json").exists()
    assert (tmp_path / "a" / "generation_config.json").exists()
    saved = ["--output", f"{tmp_path}/saved"]
    assert main(["convert", *model, "--scheme", "w8a8-static", *SHORT, *saved]) == 0
    of_saved = [*to, "--model", f"{tmp_path}/saved", "--output", f"{tmp_path}/b"]
    assert main([*of_saved, "--dtype", "float16"]) == 2
    assert "leave out --dtype" in capsys.readouterr().err
    assert main(of_saved) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "b" / "tokenizer.json").exists()
    assert not (tmp_path / "b" / "generation_config.json").exists()
    given = GenerationConfig(temperature=0.5)
    graph = fxquant.load(tmp_path / "saved")
    compressed_tensors(graph, tmp_path / "b", generation_config=given, check=False)
    written = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert written["temperature"] == 0.5


def test_the_tokenizer_may_be_left_out(tmp_path: Path) -> None:
    asked = ["export", "--to", "gptq", "--model", str(SMALL_OPT), "--scheme", "w8", "--no-check"]
    assert main([*asked, "--output", str(tmp_path / "with")]) == 0
    assert main([*asked, "--output", str(tmp_path / "without"), "--no-tokenizer"]) == 0
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("with", "without")]
    assert "tokenizer.json" in names[0] - names[1]
    assert names[1] < names[0]


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = ["export", "--to", "compressed-tensors", "--model", str(SMALL_OPT)]
    output = ["--output", f"{tmp_path}/out"]
    assert main([*to, *output]) == 2
    assert "is no saved graph: give --scheme" in capsys.readouterr().err
    assert main([*to, *output, "--scheme", "w8+kv8", *SHORT]) == 2
    assert "nearest that it can: the scheme without +kv8" in capsys.readouterr().err
    with held_target(tmp_path / "out"):
        assert main([*to, *output, "--scheme", "w8"]) == 2
    assert "another process is writing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
