"""The committed study is what its data say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.study_page import page

ROOT = Path(__file__).parent.parent
DATA = ROOT / "benchmarks" / "why_static_fails.json"


def test_the_page_follows_from_the_data() -> None:
    data = json.loads(DATA.read_text())
    assert (ROOT / "docs" / "why_static_fails.md").read_text() == page(data)


def test_the_data_add_up() -> None:
    for subject in json.loads(DATA.read_text())["subjects"]:
        for scheme, found in subject["schemes"].items():
            # Six digits are kept of each figure.
            slack = 1e-5 * max(1, abs(found["delta_loss"])) * len(found["sites"]) ** 0.5
            assert sum(found["causes"].values()) == pytest.approx(found["delta_loss"], abs=slack)
            if "in_order" in found["costs"]:
                total = sum(site["in_order"] for site in found["sites"])
                assert total == pytest.approx(found["delta_loss"], abs=slack), scheme
