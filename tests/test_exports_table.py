"""docs/exports.md has what a run gave, and a run gives it again."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest

from benchmarks import export_memory
from benchmarks.exports_table import COLUMNS, KEPT, PAGE, SCHEMES, rendered, tried

DATA = json.loads(KEPT.read_text())["targets"]
QUICK = {
    "compressed-tensors": (
        "w8",
        "w4-g7",
        "w8a8-dynamic-token",
        "w8+correct_bias",
        "w8, GPT-2",
        "fp8",
        "wnvfp4",
    ),
    "onnx": ("w4-g32/a8-dynamic-token", "w8+kv8", "nvfp4"),
}
ENGINES = pytest.mark.needs_program(
    all(find_spec(name) for name in ("onnxruntime", "compressed_tensors")), "the exports extra"
)


def test_the_page_is_that_of_the_kept_file() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert rendered(page) == page


def test_every_format_and_scheme_stands_in_the_table() -> None:
    assert set(DATA) == set(COLUMNS), "python -m benchmarks.exports_table"
    for cells in DATA.values():
        assert tuple(cells) == SCHEMES


@ENGINES
def test_the_page_has_the_figures_of_the_loss_in_the_engine() -> None:
    from benchmarks import onnx_loss

    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert onnx_loss.said(json.loads(onnx_loss.KEPT.read_text())) in page


def test_the_page_has_the_figures_of_the_memory() -> None:
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert export_memory.said(json.loads(export_memory.DATA.read_text())) in page


def cells() -> list[Any]:
    """Quick ones, and all."""
    return [
        pytest.param(target, row, marks=[] if row in QUICK.get(target, ()) else pytest.mark.slow)
        for target in COLUMNS
        for row in SCHEMES
    ]


@ENGINES
@pytest.mark.parametrize(("target", "row"), cells())
def test_a_run_gives_what_the_table_says(target: str, row: str) -> None:
    kind, reason = tried(target, row)
    assert kind == DATA[target][row][0]
    if kind == "refused":
        assert reason == DATA[target][row][1]
