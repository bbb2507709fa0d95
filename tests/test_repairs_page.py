"""The page of measured repairs is what its data say."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from benchmarks.repairs_page import figure, page
from benchmarks.repairs_table import COST, DATA, PAGE
from benchmarks.repairs_tried import SUBJECTS

DATA_NOW: dict[str, Any] = json.loads(DATA.read_text())
COST_NOW: dict[str, Any] = json.loads(COST.read_text())
SMOLLM2 = "SmolLM2-135M"


def test_the_page_follows_from_the_data() -> None:
    remedy = "python -m benchmarks.repairs_table --render"
    assert PAGE.read_text() == page(SUBJECTS, DATA_NOW, COST_NOW), remedy


def test_the_page_says_what_the_weights_were() -> None:
    text = page(SUBJECTS, DATA_NOW, COST_NOW)
    assert f"**{SMOLLM2}**" in text
    assert "Its weights are dequantized from GGUF: 78.93% Q4_1" in text


def test_prose_and_table_take_a_figure_from_the_data() -> None:
    changed = copy.deepcopy(DATA_NOW)
    changed["rows"][SMOLLM2]["w4+gptq"]["delta_loss"] = 7.25
    text = page(SUBJECTS, changed, COST_NOW)
    assert "+7.2500 ±" in text
    assert "to +7.25, with `order=static`" in " ".join(text.split())


def test_a_fourth_cause_has_its_column() -> None:
    changed = copy.deepcopy(DATA_NOW)
    changed["rows"][SMOLLM2]["w4+gptq"]["causes"] = {"weights": 0.5, "scale": 1.125}
    changed["rows"][SMOLLM2]["w4+gptq"] |= {"worst_kind": "mlp", "worst_kind_rescue": 0.25}
    text = page(SUBJECTS, changed, COST_NOW)
    (row,) = (
        line for line in text.split("\n") if line.startswith("| `w4+gptq` ") and "+1.125" in line
    )
    assert [cell.strip() for cell in row.split("|")[6:11]] == [
        *("+0.500", "", "", "+1.125", "mlp +0.250")
    ]


def test_what_was_not_measured_is_said_so() -> None:
    partial = copy.deepcopy(DATA_NOW)
    del partial["rows"][SMOLLM2]["w4+clip"]
    text = page(SUBJECTS, partial, COST_NOW)
    assert "Not measured yet: `w4+clip`." in text
    assert "`w4` (+0.72) (not measured) and" in " ".join(text.split())


def test_a_misspelled_source_or_field_is_no_figure() -> None:
    sources = {"opt": {"w4": {"delta_loss": 0.5}}}
    assert figure("opt | w4 | +.2f", sources) == "+0.50"
    for wrong in ("opd | w4 | +.2f", "opt | w4 | loss | +.2f"):
        with pytest.raises(KeyError):
            figure(wrong, sources)


def test_every_row_that_the_prose_asks_for_was_measured() -> None:
    assert "(not measured)" not in PAGE.read_text()
    assert "{{" not in PAGE.read_text()
