"""docs/architectures.md is what a run gave, and a run gives it again."""

from __future__ import annotations

import json

import pytest
import transformers

from benchmarks.architectures_table import EVERY, MAJORS, PAGE, kept, render, tried

MAJOR = transformers.__version__.partition(".")[0]


def test_the_page_is_that_of_the_kept_files() -> None:
    assert PAGE.read_text() == render()


@pytest.mark.parametrize("major", MAJORS)
def test_everything_that_is_tested_stands_in_the_table(major: str) -> None:
    names = set(json.loads(kept(major).read_text())["architectures"])
    assert set(EVERY) - names == set() or major != MAJOR
    assert {"opt", "llama", "falcon-new", "gemma3"} <= names


@pytest.mark.parametrize(
    "name",
    [name if name == "llama" else pytest.param(name, marks=pytest.mark.slow) for name in EVERY],
)
def test_a_run_gives_what_the_table_says(name: str) -> None:
    assert tried(EVERY[name]) == json.loads(kept(MAJOR).read_text())["architectures"][name]
