"""The committed study is what its data say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.study_page import page
from benchmarks.study_side import E4M3, side_by_side

ROOT = Path(__file__).parent.parent
DATA = ROOT / "benchmarks" / "why_static_fails.json"
BESIDE = ROOT / "benchmarks" / "side_by_side.json"


def test_the_page_follows_from_the_data() -> None:
    data, beside = json.loads(DATA.read_text()), json.loads(BESIDE.read_text())
    assert (ROOT / "docs" / "why_static_fails.md").read_text() == page(data, beside)


def test_a_fourth_cause_has_its_column_and_its_bar(tmp_path: Path) -> None:
    data, beside = json.loads(DATA.read_text()), json.loads(BESIDE.read_text())
    subject = data["subjects"][0]
    subject["schemes"]["w8a8-dynamic"]["causes"]["scale"] = 1.2345
    text = page(data, beside)
    assert "`rounding` and `scale` are exact Shapley values of the four parts" in text
    assert "| rounding | scale |" in " ".join(text.split())
    (row,) = (line for line in text.split("\n") if "+1.2345" in line)
    assert "w8a8-dynamic" in row
    pytest.importorskip("matplotlib")
    from benchmarks.study_pictures import draw

    draw(data, tmp_path / "with")
    subject["schemes"]["w8a8-dynamic"]["causes"]["scale"] = 0.0
    draw(data, tmp_path / "without")
    assert (tmp_path / "with/causes.png").read_bytes() != (
        tmp_path / "without/causes.png"
    ).read_bytes()


def test_the_data_add_up() -> None:
    for subject in json.loads(DATA.read_text())["subjects"]:
        for scheme, found in subject["schemes"].items():
            # Six digits are kept of each figure.
            slack = 1e-5 * max(1, abs(found["delta_loss"])) * len(found["sites"]) ** 0.5
            assert sum(found["causes"].values()) == pytest.approx(found["delta_loss"], abs=slack)
            if "in_order" in found["costs"]:
                total = sum(site["in_order"] for site in found["sites"])
                assert total == pytest.approx(found["delta_loss"], abs=slack), scheme


def test_each_window_adds_up() -> None:
    data = json.loads(BESIDE.read_text())
    for windows in data["schemes"].values():
        for window in windows:
            assert sum(window["causes"].values()) == pytest.approx(window["delta_loss"], abs=1e-6)


def test_the_figures_side_by_side_are_means_over_windows() -> None:
    data = json.loads(BESIDE.read_text())
    data["schemes"] = {scheme: windows[:4] for scheme, windows in data["schemes"].items()}
    for window, delta in zip(data["schemes"][E4M3], (0.0, 1.0, 0.0, 1.0), strict=True):
        window["delta_loss"] = delta
    text = "\n\n".join(side_by_side(data))
    assert f"| +0.5000 ± {(1 / 3 / 4) ** 0.5:.4f}" in text
    assert "4 windows of 512 tokens" in text
