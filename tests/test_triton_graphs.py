"""Whole graphs by Triton's kernels without a GPU: interpreted to the same bits."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests.processes import finished


@pytest.mark.needs_program(
    importlib.util.find_spec("triton") is not None, "triton, of the cuda extra"
)
def test_interpreted_graphs_give_the_same_bits() -> None:
    done = finished([sys.executable, "-m", "tests.triton_graphs"], TRITON_INTERPRET="1")
    assert "8 graphs agree" in done.stdout, done.stderr[-3000:]
