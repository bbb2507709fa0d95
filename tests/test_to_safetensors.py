"""Pickled weights rewritten as safetensors: the same tensors, a shard at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fxquant.cli.main import main
from fxquant.errors import ModelError
from fxquant.evaluation import to_safetensors as module
from fxquant.evaluation.to_safetensors import to_safetensors
from fxquant.frontends.streaming import stream
from fxquant.frontends.weight_files import INDEX
from tests.models import small_opt
from tests.pickles import save_pickled

SHARD = 300_000


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each shard as it is written, none above the limit that is set here."""
    sizes: list[int] = []

    def counted(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        assert sizes[-1] <= SHARD or len(tensors) == 1
        save_file(tensors, path, metadata)

    monkeypatch.setattr(module, "SHARD_BYTES", SHARD)
    monkeypatch.setattr(module, "save_file", counted)
    return sizes


def all_tensors(folder: Path) -> dict[str, Tensor]:
    index = json.loads((folder / INDEX).read_text())
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert {index["weight_map"][name] for name in tensors} == {path.name}
        found.update(tensors)
    assert set(found) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    return found


def losses(folder: Path, output: Path, *more: str) -> list[float]:
    options = ["--schemes", "w8a8-static", "--windows", "2", "--length", "48"]
    options += ["--calibration-windows", "2", "--model", str(folder), "--output", str(output)]
    assert main(["evaluate", *options, *more]) == 0
    rows = json.loads((output / "results.json").read_text())["rows"]
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("size", [10**6, 10**9])
def test_a_rewritten_model_streams_as_it_evaluates_in_memory(
    tmp_path: Path, size: int, shards: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "old model"
    model, tokenizer = small_opt()
    save_pickled(model, folder, size)
    tokenizer.save_pretrained(folder)
    before = {path.name for path in folder.iterdir()}
    assert (len(list(folder.glob("pytorch_model*.bin"))) > 2) == (size == 10**6)
    expected = losses(folder, tmp_path / "whole")
    assert main(["evaluate", "--model", str(folder), "--schemes", "fp", "--stream"]) == 2
    assert f"fxquant safetensors '{folder}' writes them" in capsys.readouterr().err
    assert main(["safetensors", str(folder)]) == 0
    assert f"{len(shards)} safetensors files" in capsys.readouterr().out
    assert len(shards) > 3
    assert losses(folder, tmp_path / "streamed", "--stream") == expected
    # Nothing else is written, and transformers reads and ties what is.
    new = {path.name for path in folder.iterdir()} - before
    assert len(new) == len(shards) + 1
    for path in folder.glob("*.bin"):
        path.unlink()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False])
def test_shared_and_transposed_memory_is_written_out(tmp_path: Path, zipped: bool) -> None:
    base = torch.randn(6, 4)
    tensors = {
        "tied": base,
        "again": base,
        "turned": base.t(),
        "part": base[2:4],
        "part of another": torch.randn(8, 4)[3:5],
        "half": torch.randn(3).to(torch.bfloat16),
        "number": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "learned": torch.nn.Parameter(torch.randn(2)),
    }
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    (path,) = to_safetensors(tmp_path)
    assert path.name == "model-00001-of-00001.safetensors"
    found = all_tensors(tmp_path)
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(found[name], value)
        assert found[name].dtype == value.dtype


def test_other_pickles_are_left_alone(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    torch.save({"b": torch.ones(2)}, tmp_path / "training_args.bin")
    to_safetensors(tmp_path)
    assert set(all_tensors(tmp_path)) == {"a"}


class Executed:
    """Unpickled without care it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def write(folder: Path, index: str = "", /, **files: Any) -> None:
    for name, content in files.items():
        torch.save(content, folder / f"pytorch_model{name}.bin")
    if index:
        (folder / "pytorch_model.bin.index.json").write_text(index)


ONE = {"a": torch.ones(2)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.exists, r"holds no pytorch_model\*\.bin"),
        (Path.rmdir, r"holds no pytorch_model\*\.bin"),
        (lambda f: (f / "m.safetensors").touch(), "safetensors files already"),
        (lambda f: write(f, x=ONE, y=ONE), "y.bin holds a, which another file holds too"),
        (lambda f: write(f, x=[torch.ones(2)]), "no dictionary of tensors but a list"),
        (lambda f: write(f, x=ONE, y={"model": ONE}), "more than named tensors: 'model' is none"),
        (lambda f: write(f, x=ONE, y={"b": Executed(f / "touched")}), "cannot read weights from"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b"PK"), "cannot read weights from"),
        (
            lambda f: write(f, '{"weight_map": {"a": "gone.bin"}}', x=ONE),
            r"lacks gone\.bin, which pytorch_model\.bin\.index\.json names",
        ),
        (lambda f: write(f, "[]", x=ONE), "must hold a JSON object"),
    ],
)
def test_what_cannot_be_rewritten_is_said_and_leaves_nothing(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    before = sorted(folder.rglob("*")) if folder.exists() else []
    with pytest.raises(ModelError, match=message):
        to_safetensors(folder)
    assert (sorted(folder.rglob("*")) if folder.exists() else []) == before


def test_a_cut_off_file_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, x={"a": torch.ones(1000)})
    path = tmp_path / "pytorch_modelx.bin"
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(ModelError, match="cannot read weights from"):
        to_safetensors(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_without_either_the_old_advice_stands(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"save_pretrained\(directory\)"):
        stream(tmp_path)
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump({}, file)
    with pytest.raises(ModelError, match="fxquant safetensors"):
        stream(tmp_path)
