"""What vLLM computes of exports: docs/exports.md has what a run gave, a run gives it again."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.vllm_table import FEW, KEPT, PAGE, REFUSED, ROWS, Cell, rendered, tried
from fxquant.cli.main import main
from fxquant.evaluation.results import read_results
from fxquant.exports.runtimes import RUNTIMES
from fxquant.exports.vllm_engine import Vllm
from tests.models import SMALL_OPT

ENGINE = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not here: make vllm-check brings it"
)
DATA = json.loads(KEPT.read_text())
# A form that is exact, two by a rule of vLLM's, one in float16, and two refusals.
AGAIN = (
    ("compressed-tensors", "w8a8-dynamic-token"),
    ("compressed-tensors", "w8a8-static"),
    ("compressed-tensors", "w4a8-dynamic-token"),
    ("awq", "w4-g32-fp16-asym"),
    ("compressed-tensors", "w8"),
    ("gptq", "w4-g32-fp16-asym"),
)


@pytest.fixture(scope="module")
def engine() -> Vllm:
    return Vllm()


def test_the_page_is_that_of_the_kept_file() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert rendered(page) == page


def test_every_form_stands_in_the_table() -> None:
    for name, rows in ROWS.items():
        cells = DATA["models"][name]
        assert tuple((target, scheme) for target, scheme, _ in cells) == rows


@ENGINE
@pytest.mark.parametrize(("target", "scheme"), AGAIN)
def test_a_run_gives_what_the_table_says(engine: Vllm, target: str, scheme: str) -> None:
    found = tried(engine, "Llama", target, scheme)
    kept = next(Cell(**cell) for *form, cell in DATA["models"]["Llama"] if form == [target, scheme])
    assert (found.kind, found.rule) == (kept.kind, kept.rule)
    if found.kind == REFUSED:
        assert found.refused == kept.refused
    elif found.rule:
        assert found.left <= FEW * found.moved


@ENGINE
def test_an_evaluation_has_vllms_row_beside_the_graphs(
    tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    out = tmp_path / "out"
    asked = ["--windows", "2", "--length", "40", "--calibration-windows", "2", "--output", str(out)]
    options = ["--schemes", "w8a8-dynamic-token", "--runtime", "vllm"]
    assert main(["evaluate", "--model", str(SMALL_OPT), *asked, *options]) == 0
    rows, made = read_results(out / "results.json")
    assert rows[2].engine == RUNTIMES["vllm"].engine()
    assert abs(rows[2].loss - rows[1].loss) < 2e-3
    assert "vllm" in made.engine
    said = capsys.readouterr()
    assert "WARNING" not in said.out + said.err


@ENGINE
def test_windows_that_are_too_long_are_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    asked = ["--windows", "1", "--length", "512", "--output", str(tmp_path / "out")]
    options = ["--schemes", "w8a8-dynamic-token", "--runtime", "vllm"]
    assert main(["evaluate", "--model", str(SMALL_OPT), *asked, *options]) == 2
    assert "give --length 511 or less" in capsys.readouterr().err
