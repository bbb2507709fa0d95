"""What is no path, at every argument that names a file or folder: one error naming the argument."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import fxquant
from fxquant.errors import FxquantError
from fxquant.evaluation.job import Job
from fxquant.evaluation.report.page import read_report, write_report
from fxquant.evaluation.source import load_text
from fxquant.evaluation.sweep_file import read_sweep
from fxquant.evaluation.to_safetensors import to_safetensors
from fxquant.files.doors import as_path, location
from tests.architectures import opt, token_ids
from tests.attack.bad import SHORT, pairs, refused, write_model
from tests.hub_format import character_tokenizer


class Given:
    """A path-like object that gives whatever it was made with."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def __fspath__(self) -> Any:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


IDS = token_ids(2, 8)
LONG = "x" * 300
KINDS: dict[str, Any] = {
    "int": 3, "true": True, "float": 0.5, "bytes": b"model", "list": ["model"], "tensor": IDS,
    "object": object(), "nul": "a\0b", "half": "\ud800", "surrogate": "\udcff", "long": LONG,
    "deep": "/".join(["x" * 100] * 60), "path of nul": Path("a\0b"), "long path": Path(LONG),
    "raises": Given(RuntimeError("no")), "raises os": Given(OSError("gone")),
    "gives bytes": Given(b"model"), "gives int": Given(3), "gives nul": Given("a\0b"),
}  # fmt: skip


@functools.cache
def graph() -> GraphModule:
    return fxquant.trace(opt())


DOORS: dict[str, tuple[Callable[[Any], object], str]] = {
    "save": (lambda path: fxquant.save(graph(), path), "directory"),
    "load": (fxquant.load, "directory"),
    "load_model": (fxquant.load_model, "name"),
    "load_model streamed": (lambda path: fxquant.load_model(path, streamed=True), "name"),
    "stream": (fxquant.stream, "directory"),
    "windows' data": (
        lambda path: fxquant.windows("builtin", character_tokenizer(), data=path),
        "data",
    ),
    "cache of convert": (
        lambda path: fxquant.convert(graph(), "w4+gptq", calibration=IDS, cache=path),
        "cache",
    ),
    "cache of recipe": (
        lambda path: fxquant.recipe("w4+gptq", calibration=IDS, cache=path),
        "cache",
    ),
    "explain": (lambda path: fxquant.explain(graph(), "w8", data=IDS, output=path), "output"),
    "plan": (lambda path: fxquant.plan(graph(), data=IDS, budget=1.0, output=path), "output"),
    "dot": (lambda path: fxquant.inspect(graph()).write_dot(path), "path"),
    "sweep": (read_sweep, "file"),
    "report": (read_report, "results"),
    "page": (lambda path: write_report(".", path), "output"),
    "safetensors": (to_safetensors, "directory"),
    "job's output": (lambda path: Job("model", ("w8",), output=path), "output"),
    "job's cache": (lambda path: Job("model", ("w8",), cache=path), "cache"),
    "job's data": (lambda path: Job("model", ("w8",), data=path), "data"),
    "text of a job": (load_text, "text"),
}
EMPTY = ("windows' data", *(name for name in DOORS if name != "windows' data"))


@pytest.mark.parametrize(("door", "kind"), pairs(DOORS, KINDS))
def test_what_is_no_path(
    door: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, argument = DOORS[door]
    with pytest.raises(FxquantError, match=rf"^{argument} ") as caught:
        call(KINDS[kind])
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("door", DOORS)
def test_an_empty_path(door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be the working directory."""
    monkeypatch.chdir(tmp_path)
    call, argument = DOORS[door]
    with pytest.raises(FxquantError, match=f"^{argument} is empty"):
        call("")
    assert list(tmp_path.iterdir()) == []


NEEDED = ("save", "load", "load_model", "stream", "sweep", "report", "page", "safetensors")


@pytest.mark.parametrize("door", NEEDED)
def test_none_where_a_path_is_needed(door: str) -> None:
    call, argument = DOORS[door]
    with pytest.raises(FxquantError, match=f"^{argument} must be a path.*NoneType"):
        call(None)


def loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def file(folder: Path) -> Path:
    (folder / "file").write_text("words of a file")
    return folder / "file"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


PLACES: dict[str, Callable[[Path], Path]] = {
    "a link to itself": loop, "a file": file, "below a file": lambda folder: file(folder) / "x",
    "a pipe": pipe, "below a pipe": lambda folder: pipe(folder) / "x",
    "a device": lambda _: Path("/dev/null"), "below a device": lambda _: Path("/dev/null/x"),
    "endless": lambda _: Path("/dev/zero"),
}  # fmt: skip
FOLDERS = ("save", "load", "load_model", "load_model streamed", "stream", "cache of convert",
           "explain", "plan", "report", "safetensors")  # fmt: skip


@pytest.mark.parametrize(("door", "place"), pairs(FOLDERS, PLACES))
def test_no_folder_where_one_is_needed(door: str, place: str, tmp_path: Path) -> None:
    path = PLACES[place](tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FxquantError, match=str(path)):
        DOORS[door][0](path)
    assert sorted(tmp_path.iterdir()) == before


FILES: dict[str, Callable[[Any], object]] = {
    "scheme": lambda path: fxquant.convert(graph(), path),
    "scheme's name": lambda path: fxquant.convert(graph(), f"{path}.json"),
    "text": lambda path: fxquant.windows(path, character_tokenizer()),
    "text's name": lambda path: fxquant.windows(str(path), character_tokenizer()),
    "evaluate's text": lambda path: fxquant.evaluate(graph(), path, character_tokenizer()),
    "sweep": read_sweep,
    "page": lambda path: write_report(path.parent, path),
    "dot": lambda path: fxquant.inspect(graph()).write_dot(path),
}
RIGHT = {
    ("text", "a file"),
    ("page", "a file"),
    ("dot", "a file"),
    ("dot", "a device"),
    ("dot", "endless"),
}
NO_FILES: dict[str, Callable[[Path], Path]] = {
    **PLACES, "a folder": lambda folder: folder, "nothing": lambda folder: folder / "no" / "file",
}  # fmt: skip


@pytest.mark.parametrize(("door", "place"), pairs(FILES, NO_FILES))
def test_no_file_where_one_is_needed(door: str, place: str, tmp_path: Path) -> None:
    path = NO_FILES[place](tmp_path)
    if (door.split("'")[0].removeprefix("evaluate") or "text", place) in RIGHT:
        return
    if door == "scheme's name" and path.parent == tmp_path and place != "a folder":
        path.rename(tmp_path / f"{path.name}.json")
    with pytest.raises(FxquantError, match=str(path.parent)):
        FILES[door](path)


def test_paths_of_any_class_are_paths(tmp_path: Path) -> None:
    text, path, other = (str(tmp_path / name) for name in ("text", "path", "other"))
    for place in (text, Path(path), Given(other)):
        fxquant.save(graph(), place)
        with torch.no_grad():
            assert torch.equal(fxquant.load(place)(IDS), graph()(IDS))
    given = Given(str(write_model(tmp_path / "model")))
    assert fxquant.load_model(given).name == str(tmp_path / "model")
    assert fxquant.stream(given).config.model_type == "opt"
    assert as_path(given, "x") == tmp_path / "model"
    assert location("./no/such", "x") == "./no/such"
    (tmp_path / "words").write_text("many words " * 400)
    cut = fxquant.windows(Given(str(tmp_path / "words")), character_tokenizer(), length=16)
    assert cut.evaluation.shape == (8, 16)


OPTIONS = (
    ("evaluate", "--schemes=w8", "--model={model}", "--output={}"),
    ("evaluate", "--schemes=w4+gptq", "--model={model}", "--cache={}"),
    ("evaluate", "--schemes=w8", "--model={model}", "--dataset=wikitext2", "--data={}"),
    ("evaluate", "--schemes=w8", "--model={}"), ("evaluate", "--schemes={}.json", "--model=x"),
    ("evaluate", "--schemes=w8", "--model={model}", "--text={}"),
    ("evaluate", "--schemes=w8", "--model={model}", "--dataset={}"),
    ("convert", "--scheme=w8", "--model={model}", "--output={}"),
    ("inspect", "--scheme=w8", "--model={model}", "--dot={}"), ("inspect", "--model={}"),
    ("explain", "--scheme=w8", "--model={model}", "--output={}"),
    ("plan", "--budget=1", "--model={model}", "--output={}"),
    ("report", "{}"), ("report", "{model}", "--output={}"), ("table", "{}"), ("sweep", "{}"),
    ("safetensors", "{}"), ("reproduce", "opt125m", "--output={}"),
)  # fmt: skip


@pytest.mark.parametrize("arguments", OPTIONS, ids=" ".join)
def test_options(
    arguments: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = write_model(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for value in ("", LONG, "x/" * 3000, str(loop(tmp_path))):
        if not value and "{}.json" in arguments[1]:
            continue
        short = SHORT if arguments[0] == "evaluate" else ()
        refused(capsys, (*(each.format(value, model=model) for each in arguments), *short))
    assert list((tmp_path / "empty").iterdir()) == []
