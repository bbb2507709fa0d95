"""Folders that hold no model, or not the one of their files: refused in memory and streamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxquant.errors import ModelError
from fxquant.frontends.pretrained import read_model
from fxquant.frontends.streaming import stream
from fxquant.frontends.tracing import trace
from fxquant.frontends.weight_files import INDEX
from tests.architectures import ARCHITECTURES, opt, token_ids
from tests.attack.bad import SHORT, edit_json, edit_weights, refused, write_model
from tests.pickles import save_pickled

WAYS = ((), ("--stream",))
FC1 = "model.decoder.layers.1.fc1.weight"
HEAD, TOKENS = "lm_head.weight", "model.decoder.embed_tokens.weight"

CONTENTS = {
    "list": b"[]", "text": b'"opt"', "number": b"3", "null": b"null", "empty": b"",
    "truncated": b'{"model_type": "op', "mark": b'\xef\xbb\xbf{"model_type": "opt"}',
    "utf-16": '{"model_type": "opt"}'.encode("utf-16"), "latin-1": b'{"model_type": "\xe9"}',
    "deep": b'{"a":' * 100_000, "deep list": b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}",
    "huge number": b'{"model_type": "opt", "x": ' + b"9" * 400 + b"}", "half": b'{"a": "\\ud800"}',
    "nothing": b"{}", "inf": b'{"model_type": "opt", "dropout": 1e400}',
}  # fmt: skip
NO_SIZES: tuple[Any, ...] = (0, -1, 2**40, "32", 1.5, True, [], {})
VALUES: list[tuple[str, Any]] = [
    *((name, value) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads",
       "vocab_size", "ffn_dim", "max_position_embeddings", "word_embed_proj_dim")
      for value in NO_SIZES),
    *(("activation_function", value) for value in ("zzz", 3, "", ["relu"])),
    *(("model_type", value) for value in ("zzz", 3, "", "t5", "vit", None)),
    *(("dtype", value) for value in ("load", "int8", 3, "nn")),
    ("num_attention_heads", 5), ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ("num_hidden_layers", 1), ("num_hidden_layers", 3), ("hidden_size", 16), ("vocab_size", 129),
    ("to_dict", 1), ("hidden_size", None), ("vocab_size", None),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def both_refuse(capsys: pytest.CaptureFixture[str], folder: Path, *named: str) -> None:
    for more in WAYS:
        command = ("evaluate", "--model", folder, "--schemes", "w8", *SHORT, *more)
        refused(capsys, command, str(folder), *named)


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_config_that_is_none(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_bytes(CONTENTS[kind])
    both_refuse(capsys, folder, "config.json")


@pytest.mark.parametrize(("name", "value"), VALUES, ids=repr)
def test_a_value_in_the_config(
    name: str, value: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(folder / "config.json", lambda data: data.update({name: value}))
    both_refuse(capsys, folder)


def test_a_config_that_lacks_keys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("hidden_size", "vocab_size", "num_hidden_layers", "ffn_dim"):
        edit_json(folder / "config.json", lambda data, name=name: data.pop(name) and None)  # type: ignore[misc]
        both_refuse(capsys, folder)


def replace(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


WEIGHTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(FC1), FC1),
    "extra": (lambda t: t.update({"model.decoder.layers.1.fc3.weight": t[FC1].clone()}), "fc3"),
    "extra layer": (lambda t: t.update({FC1.replace("1", "7", 1): t[FC1].clone()}), "layers.7"),
    "misshaped": (replace(FC1, lambda w: w[:5].clone()), FC1),
    "transposed": (replace(FC1, lambda w: w.t().contiguous()), FC1),
    "integers": (replace(FC1, lambda w: (100 * w).to(torch.int8)), FC1),
    "longs": (replace(FC1, lambda w: w.long()), FC1),
    "truths": (replace(FC1, lambda w: w > 0), FC1),
    "flat": (replace(FC1, lambda w: w.flatten()), FC1),
    "scalar": (replace(FC1, lambda w: w[0, 0].clone()), FC1),
    "complex": (replace(FC1, lambda w: w.to(torch.complex64)), "C64"),
    "8 bits": (replace(FC1, lambda w: w.to(torch.float8_e4m3fn)), "F8_E4M3"),
    "untied": (lambda t: t.update({HEAD: t[TOKENS] + 1}), HEAD),
    "misshaped head": (lambda t: t.update({HEAD: t[TOKENS][:9].clone()}), HEAD),
    "no tensors": (lambda t: t.clear(), "lacks weights"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_another_model(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, named = WEIGHTS[kind]
    edit_weights(folder, change)
    both_refuse(capsys, folder, named)


@pytest.mark.parametrize("content", [b"", b"x" * 9, b"\xff" * 64, b"\x02" + bytes(7) + b"{}"])
def test_files_of_weights_that_are_none(
    content: bytes, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").write_bytes(content)
    both_refuse(capsys, folder)


def sharded(folder: Path) -> list[str]:
    """The weights in two files with an index; the names in the second."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2],
              "model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, part in halves.items() for n in part}}
    (folder / INDEX).write_text(json.dumps(index))
    return names[1::2]


def moved(target: Any) -> Callable[[dict[str, Any], list[str]], Any]:
    return lambda data, names: data["weight_map"].update({names[0]: target})


INDEXES: dict[str, Callable[[dict[str, Any], list[str]], Any]] = {
    "no map": lambda data, names: data.pop("weight_map") and None,
    "list": lambda data, names: data.update(weight_map=[1]),
    "null": lambda data, names: data.update(weight_map=None),
    "text": lambda data, names: data.update(weight_map="model.safetensors"),
    "empty": lambda data, names: data.update(weight_map={}),
    "top is a list": lambda data, names: [data],
    "number": moved(3), "none": moved(None), "nowhere": moved(""), "dot": moved("."),
    "outside": moved("../x.safetensors"), "absolute": moved("/etc/passwd"),
    "below": moved("a/b.safetensors"), "missing shard": moved("model-3.safetensors"),
    "zero": moved("a\0b"), "other shard": moved("model-00001-of-00002.safetensors"),
    "one too many": lambda data, names: data["weight_map"].update(
        {"nothing": "model-00001-of-00002.safetensors"}),
    "one too few": lambda data, names: data["weight_map"].pop(names[0]) and None,
    "a shard unread": lambda data, names: [data["weight_map"].pop(n) for n in names] and None,
}  # fmt: skip


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_does_not_fit(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sharded(folder)
    graph = trace(stream(folder))
    assert graph(input_ids=token_ids(1, 5)).shape == (1, 5, 128)
    edit_json(folder / INDEX, lambda data: INDEXES[kind](data, names))
    both_refuse(capsys, folder)


def test_files_beside_the_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "consolidated.safetensors").write_bytes(b"of another library")
    assert all(parameter.is_meta for parameter in stream(folder).parameters())
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"of another save")
    both_refuse(capsys, folder, "model-00002-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")
    both_refuse(capsys, folder, "adapter")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_pipes_and_folders_are_no_files(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    both_refuse(capsys, folder, name)
    (folder / name).unlink()
    (folder / name).mkdir()
    both_refuse(capsys, folder, name)


LEFTOVERS: dict[str, dict[str, Callable[[dict[str, Tensor]], Tensor]]] = {
    "opt": {HEAD: lambda t: t[TOKENS].clone()},
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": lambda t: torch.ones(4)},
    "gpt2": {"transformer.h.0.attn.masked_bias": lambda t: torch.tensor(-1e4),
             "transformer.h.0.attn.bias": lambda t: torch.zeros(1, 1, 64, 64)},
}  # fmt: skip


@pytest.mark.parametrize("architecture", LEFTOVERS)
def test_what_older_versions_stored_too_is_ignored(architecture: str, tmp_path: Path) -> None:
    """Copies of a tied weight; buffers that are computed now, whatever values are stored."""
    ARCHITECTURES[architecture]().save_pretrained(tmp_path)
    expected = trace(stream(tmp_path))
    more = LEFTOVERS[architecture]
    edit_weights(tmp_path, lambda t: t.update({name: make(t) for name, make in more.items()}))
    ids = {"input_ids": token_ids(2, 7)}
    with torch.no_grad():
        for model in (stream(tmp_path), read_model(tmp_path, dtype="auto")):
            assert torch.equal(trace(model)(**ids), expected(**ids))


def test_a_pickle_is_held_to_the_same_rules(tmp_path: Path) -> None:
    model = opt()
    save_pickled(model, tmp_path)
    ids = token_ids(2, 7)
    with torch.no_grad():
        expected = trace(model)(input_ids=ids)
        found = trace(read_model(tmp_path, dtype="auto"))(input_ids=ids)
    assert torch.equal(expected, found)
    edit_json(tmp_path / "config.json", lambda data: data.update(num_hidden_layers=1))
    with pytest.raises(ModelError, match=r"holds weights.*layers\.1"):
        read_model(tmp_path, dtype="auto")


def test_without_docstrings_no_model_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would blame the config for it."""
    without = SimpleNamespace(flags=SimpleNamespace(optimize=2))
    monkeypatch.setattr("fxquant.frontends.model_config.sys", without)
    for more in WAYS:
        command = ("evaluate", "--model", folder, "--schemes", "w8", *SHORT, *more)
        refused(capsys, command, "python -OO", "docstrings")
