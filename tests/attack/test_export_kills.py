"""Exports that are killed at any moment: what stands there is whole, and the next run works."""

from __future__ import annotations

import random
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from fxquant.exports.aoti_file import TARGET as AOTI
from fxquant.exports.folder import is_export
from fxquant.exports.table import FORMATS
from tests.kills import killed
from tests.test_export_compressed import tiny_llama

KILLS, OF_COMPILERS = 12, 3


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_killed_at_random(name: str, earlier: bool, tmp_path: Path) -> None:
    for package in FORMATS[name].target.packages:
        if not find_spec(package):
            pytest.skip(f"not installed: {package}")
    model, out = tiny_llama(), tmp_path / "out"

    def export(folder: Path = out, scheme: str = "w4-g32-fp16") -> None:
        FORMATS[name].export(model, folder, scheme=scheme, check=False)

    started = time.perf_counter()
    export(tmp_path / "whole" / "out")
    taken = max(time.perf_counter() - started, 0.5)  # a test's clock may stand still
    wanted = files(tmp_path / "whole" / "out")
    if earlier:
        FORMATS["compressed-tensors"].export(model, out, scheme="w8", check=False)
        before = files(out)
    hit = 0
    for _ in range(OF_COMPILERS if name == AOTI.name else KILLS):
        hit += killed(export, random.uniform(0, 1.2 * taken))
        if out.exists():  # an earlier one, or what a run had put in place when it was killed
            assert is_export(out)
            assert files(out) == wanted or (earlier and files(out) == before)
    print(f"{hit} killed, within {1.2 * taken:.1f} s")
    export()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert files(out).keys() == wanted.keys()
    assert is_export(out)
