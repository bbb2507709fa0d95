"""Tables in README and docs are what the committed results say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import readme_tables
from benchmarks.readme_tables import ROOT, pages, table_of, with_tables
from fxquant.errors import DataError
from fxquant.evaluation import Job, run
from fxquant.evaluation.published import LADDER
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


# --- the tables of README that no evaluation makes ------------------------------------------------

README = (ROOT / "README.md").read_text()
MACHINES = ROOT / "benchmarks" / "machines"


@pytest.mark.parametrize("source", ["benchmarks/machines", "evaluation/published.py"])
def test_readme_has_no_other_figures_than_its_sources(source: str) -> None:
    """Any digit changed by hand is noticed, and put right."""
    start = README.index(f"<!-- table: {source} -->")
    end = README.index("<!-- /table -->", start)
    digits = [n for n in range(start, end) if README[n].isdigit()]
    assert len(digits) > 20
    for place in digits[:: len(digits) // 10]:
        wrong = README[:place] + str(9 - int(README[place])) + README[place + 1 :]
        assert with_tables(wrong) == README


def test_the_reference_is_the_published_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = table_of(ROOT / "evaluation" / "published.py")
    for words in ("3.323711", "27.7632", "6.391982", "597.0387", "+3.068271", "W8A8 static p99.9"):
        assert words in shown
    first, *rest = LADDER
    other = (first, *rest[:-1], replace(rest[-1], delta_loss=1.0))
    monkeypatch.setattr(readme_tables, "LADDER", other)
    assert with_tables(README) != README


def test_machines_stand_side_by_side_with_their_goals(tmp_path: Path) -> None:
    """A ratio that a machine lacks is an empty cell; goals are those of what the machine can do."""
    data = json.loads(min(MACHINES.iterdir()).read_text())
    data |= {"processor": "x86_64", "features": ["avx2"], "int8": False, "held": {}, "threads": 2}
    data["ratios"] = {
        "w8 graph": 1.2345,
        "calibration per window / forward": 1.41,
        "w8a8-dynamic-token graph": 1.04,
    }
    fast = {**data, "processor": "Quick", "features": ["avx2", "avx512_vnni"], "int8": True}
    fast |= {"threads": 7, "held": {"SOME_ISA": "AVX2"}}
    fast["ratios"] = {"w8a8-dynamic-token graph": 0.46, "bfloat16: w8a8-dynamic-token graph": 0.7}
    for name, found in (("a", data), ("b", fast)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    lines = table_of(tmp_path).split("\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0][1:] == [
        "x86_64, AVX2, 2 threads",
        "Quick, AVX512-VNNI, 7 threads held to AVX2",
    ]
    assert ["weights alone: w8, level integer", "1.23", ""] in rows
    assert ["calibration, per window", "1.41 (1.4: missed)", ""] in rows
    assert ["w8a8-dynamic-token, level integer", "1.04 (1.05)", "0.46 (0.45: missed)"] in rows
    assert ["in a bfloat16 model, to it: level integer", "", "0.70 (0.75)"] in rows
    assert not any("4-g128" in line for line in lines)
    words = ("7 threads on Quick", f"torch {data['versions']['torch']}", "512 tokens")
    for each in (*words, data["model"], "SOME_ISA=AVX2", "int8 instructions"):
        assert each in lines[-1]
    assert "2 threads on x86_64" in lines[-2]


def test_a_file_of_another_kind_among_the_machines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no result"):
        table_of(tmp_path)
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(DataError, match=r"other\.json is no result of benchmarks/speed\.py"):
        table_of(tmp_path)
