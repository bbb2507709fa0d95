"""What the tests of bad inputs share: a tiny model on disk, and what an error must look like."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxquant.cli.main import main
from tests.architectures import opt
from tests.hub_format import character_tokenizer

SHORT = ("--windows", "1", "--length", "16", "--calibration-windows", "1")


def pairs(one: Iterable[Any], other: Iterable[Any]) -> list[Any]:
    """All pairs as parameters of a test; each value of either in the normal set, the rest slow."""
    firsts, seconds = list(one), list(other)
    found = []
    for i, first in enumerate(firsts):
        for j, second in enumerate(seconds):
            normal = i % len(seconds) == j or j % len(firsts) == i
            found.append(pytest.param(first, second, marks=() if normal else pytest.mark.slow))
    return found


def write_model(folder: Path, **options: Any) -> Path:
    """A random OPT of two layers and a tokenizer of one token a letter."""
    opt(**options).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write what ``change`` makes of a JSON file: its result, or the object that it changed."""
    data = json.loads(path.read_text())
    result = change(data)
    path.write_text(json.dumps(data if result is None else result))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def exit_code(*arguments: object) -> int:
    """Of a command, also where argparse leaves with it."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else -1


def refused(capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], *named: str) -> None:
    """The command must end with 2 and one line of error that holds each of ``named``."""
    capsys.readouterr()
    code = exit_code(*arguments)
    written = capsys.readouterr().err
    assert code == 2, written
    found = re.findall(r"^fxquant[a-z ]*: error: .*", written, re.MULTILINE)
    assert len(found) == 1, written
    assert len(found[0]) < 1000, written
    assert "Traceback" not in written
    for each in named:
        assert each in written
