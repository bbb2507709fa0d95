"""Tables in README and docs are what the committed results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.readme_tables import pages, table_of, with_tables
from fxquant.errors import DataError
from fxquant.evaluation import Job, run
from tests.models import SMALL_OPT

MARKED = "before\n<!-- table: results.json -->\nstale\n<!-- /table -->\nafter\n"


def test_every_page_is_up_to_date() -> None:
    marked = [page for page in pages() if "<!-- table: " in page.read_text()]
    assert any(page.name == "README.md" for page in marked)
    for page in marked:
        text = page.read_text()
        assert text.count("<!-- table: ") == text.count("<!-- /table -->")
        assert with_tables(text) == text, f"{page.name}: python -m benchmarks.readme_tables"


def test_a_table_is_made_from_its_results(tmp_path: Path) -> None:
    outcome = run(
        Job(
            model=str(SMALL_OPT),
            schemes=("w8",),
            windows=2,
            length=32,
            calibration_windows=0,
            output=tmp_path,
            command="fxquant evaluate ...",
        )
    )
    text = with_tables(MARKED, tmp_path)
    assert text.startswith("before\n<!-- table: results.json -->\n\n| scheme")
    assert text.endswith("\n\n<!-- /table -->\nafter\n")
    assert "stale" not in text
    assert f"{outcome.rows[1].loss:.4f}" in text
    assert outcome.provenance.line() in text
    assert "> Weights alone: w8" in text
    assert with_tables(text, tmp_path) == text


def test_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/results\.json"):
        table_of(tmp_path / "nowhere" / "results.json")
    with pytest.raises(DataError, match=r"nowhere/results\.jsonl"):
        table_of(tmp_path / "nowhere" / "results.jsonl")
