"""Models without a tokenizer, or with a damaged one: refused where text is read, or one is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.cli.main import main
from fxquant.errors import ModelError
from fxquant.evaluation.models import finds_tokenizer
from fxquant.frontends import pretrained
from fxquant.ir.graph import info
from tests.hub_format import character_tokenizer
from tests.test_export_compressed import tiny_llama

SHORT = ("--length", "16", "--windows", "2", "--calibration-windows", "2")
NONE = "no tokenizer is written: none is found in"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


@pytest.fixture
def whole(bare: Path) -> Path:
    character_tokenizer().save_pretrained(bare)
    return bare


def run(command: str, model: Path, *options: object) -> int:
    return main([command, "--model", str(model), *SHORT, *map(str, options)])


@pytest.mark.parametrize("more", [(), ("--stream",)])
@pytest.mark.parametrize("scheme", ["w8", "w8a8-dynamic-token", "w4+equalize", "fp"])
def test_it_is_converted_where_no_text_is_read(
    scheme: str,
    more: tuple[str, ...],
    bare: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = tmp_path / "saved"
    assert run("convert", bare, "--scheme", scheme, *more, "--output", saved) == 0
    out = capsys.readouterr().out
    assert f"{NONE} {bare}\nwritten to {saved}\n" in out
    ids = torch.randint(96, (2, 9))
    other = fxquant.convert(tiny_llama(), scheme)
    assert torch.equal(fxquant.load(saved)(ids), other(ids))
    with pytest.raises(ModelError, match="holds no tokenizer"):
        fxquant.load_model(saved)
    assert info(fxquant.load_model(saved, tokenizer=False).graph).scheme == scheme


@pytest.mark.parametrize("target", ["compressed-tensors", "onnx", "gguf", "gptq", "pt2"])
def test_it_is_exported_where_no_text_is_read(
    target: str, bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if target == "onnx" and not find_spec("onnxscript"):
        pytest.skip("not installed: onnxscript")
    asked = ("--to", target, "--no-check", "--output", tmp_path / "out")
    assert run("export", bare, "--scheme", "w8-g32-fp16", *asked) == 0
    assert f"{NONE} {bare}\n" in capsys.readouterr().out
    saved = tmp_path / "saved"
    assert run("convert", bare, "--scheme", "w8-g32-fp16", "--output", saved) == 0
    capsys.readouterr()
    assert main(["export", "--model", str(saved), *map(str, asked)]) == 0
    assert f"{NONE} {saved}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("convert", ("--scheme", "w8a8-static")),
        ("convert", ("--scheme", "w4+gptq")),
        ("inspect", ("--scheme", "w8a8-static")),
        ("export", ("--to", "compressed-tensors", "--scheme", "nvfp4", "--output", "out")),
        ("evaluate", ("--schemes", "w8")),
        ("evaluate", ("--stream", "--schemes", "w8")),
    ],
)
def test_it_is_refused_where_text_is_read(
    command: str,
    options: tuple[str, ...],
    bare: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(command, bare, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{bare}: it holds no tokenizer" in line
    assert not (tmp_path / "out").exists()


def _damaged(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def _partial(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')


def _slow_only(folder: Path) -> None:  # and what it needs is no model of SentencePiece
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x00\x01")


@pytest.mark.parametrize("damage", [_damaged, _partial, _slow_only])
def test_what_there_is_and_cannot_be_read_is_not_left_out_unsaid(
    damage: Callable[[Path], None],
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(whole)
    saved, asked = tmp_path / "saved", ("--scheme", "w8")
    for command, more in (("convert", ()), ("export", ("--to", "gptq", "--no-check"))):
        assert run(command, whole, *asked, *more, "--output", saved) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(whole) in line
        assert "tokenizer" in line
        assert not saved.exists()
        assert run(command, whole, *asked, *more, "--no-tokenizer", "--output", saved) == 0
        assert NONE not in capsys.readouterr().out
        assert not list(saved.glob("*tokenizer*"))
        shutil.rmtree(saved)
    for command in ("convert", "inspect"):  # which write none
        assert run(command, whole, *asked) == 0
        assert run(command, whole, "--scheme", "w8a8-static") == 2


def test_a_tokenizer_that_text_is_cut_with_can_be_left_out(whole: Path, tmp_path: Path) -> None:
    for options in ((), ("--no-tokenizer",)):
        saved = tmp_path / f"saved{len(options)}"
        asked = ("--scheme", "w8a8-static", *options, "--output", saved)
        assert run("convert", whole, *asked) == 0
        assert (saved / "tokenizer.json").exists() == (not options)


def test_a_model_loaded_without_says_so_when_asked(whole: Path) -> None:
    loaded = fxquant.load_model(whole, tokenizer=False)
    with pytest.raises(ModelError, match=r"without its tokenizer: load_model\(.*\) reads it"):
        _ = loaded.tokenizer
    assert fxquant.load_model(whole).tokenizer.get_vocab() == character_tokenizer().get_vocab()


def test_of_a_hub_model_any_of_the_files_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"config.json"}

    def cached(name: str, file: str, **_: object) -> str | None:
        assert name == "nobody/nothing"
        return f"/cache/{file}" if file in held else None

    monkeypatch.setattr(pretrained, "cached_file", cached)
    assert not finds_tokenizer("nobody/nothing")
    held.add("merges.txt")
    assert finds_tokenizer("nobody/nothing")
