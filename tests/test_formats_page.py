"""The page of measured formats is what its data say."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from benchmarks.formats_page import PARTS_OF, page
from benchmarks.formats_table import COST, DATA, PAGE
from benchmarks.formats_tried import GROUPS
from fxquant.schemes.scheme import Scheme

NOW: dict[str, Any] = json.loads(DATA.read_text())
COST_NOW: dict[str, Any] = json.loads(COST.read_text())


def test_the_page_follows_from_the_data() -> None:
    assert PAGE.read_text() == page(NOW, COST_NOW), "python -m benchmarks.formats_table --render"


def test_prose_and_tables_take_a_figure_from_the_data() -> None:
    changed = copy.deepcopy(NOW)
    row = changed["rows"]["wnvfp4"]
    row["delta_loss"], row["delta_error"] = 7.25, 0.125
    text = page(changed, COST_NOW)
    assert "+7.2500 ± 0.1250" in text
    assert "+7.25" in " ".join(text.replace("+7.2500", "").split())


def test_the_parts_of_a_format_sum_to_its_loss() -> None:
    for line in page(NOW, COST_NOW).split("## ")[1].splitlines():
        cells = [cell.strip(" `") for cell in line.split("|")[1:-1]]
        if len(cells) == 7 and cells[1] in PARTS_OF:
            total, *parts = (float(cell.split()[0]) for cell in cells[3:] if cell)
            assert sum(parts) == pytest.approx(total, abs=2e-4)


def test_what_was_not_measured_is_said_so() -> None:
    partial = copy.deepcopy(NOW)
    del partial["rows"]["wnvfp4"]
    text = page(partial, COST_NOW)
    assert "Not measured yet:" in text
    assert "`wnvfp4`" in text.rsplit("Not measured yet:", 1)[1]
    assert "(not measured)" in text


def test_every_row_that_the_prose_asks_for_was_measured() -> None:
    assert "(not measured)" not in PAGE.read_text()
    assert "{{" not in PAGE.read_text()


def test_the_rows_are_schemes() -> None:
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names))
    for name in names:
        assert Scheme.parse(name).spec.weight is not None
    for name, (_, exact, fine) in PARTS_OF.items():
        spec, plain = (Scheme.parse(each).spec.weight for each in (name, exact))
        assert spec is not None
        assert plain is not None
        assert (spec.grid, spec.group_size) == (plain.grid, plain.group_size)
        finest = Scheme.parse(fine).spec.weight
        assert finest is not None
        assert (finest.grid, finest.group_size) == (spec.grid, 16)
