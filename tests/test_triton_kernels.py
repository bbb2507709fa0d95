"""Triton's kernels without a GPU: interpreted to the same bits, compiled to the right machine code.

Each runs in a process of its own, see tests/triton_calls.py and tests/triton_variants.py.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch

from fxquant.numerics.kernels import cuda, table
from fxquant.numerics.kernels.first_test import Kind
from tests.fused_calls import SINGLE, Calls
from tests.processes import finished

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.needs_program(HAS_TRITON, "triton, of the cuda extra")


def run(*arguments: str, interpreted: bool = True, module: str = "triton_calls") -> str:
    command = [sys.executable, "-m", f"tests.{module}", *arguments]
    done = finished(command, TRITON_INTERPRET="1" if interpreted else "0")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SEEDS = [(0, 3), *(pytest.param(n, n + 20, marks=pytest.mark.slow) for n in (3, 23, 43))]


@needs_triton
@pytest.mark.parametrize(("first", "last"), SEEDS)
def test_interpreted_calls_give_the_same_bits(first: int, last: int) -> None:
    assert "calls agree" in run("agree", str(first), str(last))


@needs_triton
@pytest.mark.parametrize("every", ["7", pytest.param("1", marks=pytest.mark.slow)])
def test_each_kind_of_kernel_is_asked_before_its_first_call(every: str) -> None:
    assert "kinds of kernel are asked" in run("first", every)


@needs_triton
@pytest.mark.parametrize("last", ["20", pytest.param("1000", marks=pytest.mark.slow)])
def test_a_call_compiles_only_what_was_asked(last: str) -> None:
    assert "calls compile nothing new" in run("0", last, module="triton_variants")


@needs_triton
@pytest.mark.parametrize("every", ["7", pytest.param("1", marks=pytest.mark.slow)])
def test_a_mistake_in_one_tile_is_seen_and_its_calls_fall_back(every: str) -> None:
    assert "is asked for itself" in run("tiles", every)


@needs_triton
@pytest.mark.parametrize("capability", ["90", *(pytest.param("80", marks=pytest.mark.slow),)])
def test_compiled_without_a_gpu(capability: str) -> None:
    assert run("compiled", capability, interpreted=False).count(f"sm_{capability}") == 8


def row_reasons(name: str, *operands: Any) -> str:
    (row,) = (row for row in table.TABLE if (row.operator, row.device) == (name, "cuda"))
    return row.why_not(*operands)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a call is not Triton's, as far as it can be told without the device."""
    monkeypatch.setattr(cuda, "missing_library", lambda: "triton is not installed")
    grouped = Calls(1, (3, 70), SINGLE).site(8, 5, True)
    assert row_reasons("grouped_int_linear", *grouped, 5, True) == (
        "groups of 5 codes begin in the middle of a byte"
    )
    site = Calls(1, (3, 70), SINGLE).site(8, 0, False)
    assert row_reasons("int_linear", *site, 0, False) == "triton is not installed"
    double = (*site[:8], site[8].double())
    assert row_reasons("int_linear", *double, 0, False) == "no kernel for torch.float64"
    huge = torch.empty(1, dtype=torch.int8).expand(2**31, 1)
    monkeypatch.setattr(cuda, "_without", lambda *_: "")
    assert "sums or more" in row_reasons("int_linear", huge, *site[1:], 0, False)
    assert row_reasons("quantize_rows", torch.empty(0, 4), "tensor", True, -127, 127)


@pytest.mark.parametrize(
    ("rows", "tall"), [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 128), (999, 128)]
)
@pytest.mark.parametrize(("length", "deep"), [(5, 32), (63, 32), (64, 64), (127, 64), (128, 128)])
def test_calls_of_each_tile_ask_a_kind_of_their_own(
    monkeypatch: pytest.MonkeyPatch, rows: int, tall: int, length: int, deep: int
) -> None:
    """By their rows, and by the length of K or of a group of it; int_linear's chunk is neither."""
    asked: list[Kind] = []

    def without(x: torch.Tensor, kind: Kind) -> str:
        asked.append(kind)
        return ""

    monkeypatch.setattr(cuda, "_without", without)
    site = Calls(rows, (rows, length), SINGLE).site(3, 0, False)
    for chunk in (0, 1024):
        assert not row_reasons("int_linear", *site, chunk, False)
    grouped = Calls(rows, (1, rows, 2 * length + 1), SINGLE).site(3, length, False)
    assert not row_reasons("grouped_int_linear", *grouped, length, False)
    product = Calls(rows, (2, rows), SINGLE).product(length, 3)
    assert not row_reasons("int_product", *product)
    assert [(kind.rows, kind.depth) for kind in asked] == [(tall, deep)] * 4


@pytest.mark.parametrize(
    ("length", "block", "weights"),
    [
        *((1, 128, 128), (128, 128, 128), (129, 256, 256), (576, 1024, 1024), (1536, 2048, 1024)),
        *((2048, 2048, 1024), (2049, 4096, 1024), (8192, 4096, 1024), (8193, 4096, 1024)),
    ],
)
def test_rows_of_each_block_and_alignment_ask_a_kind_of_their_own(
    monkeypatch: pytest.MonkeyPatch, length: int, block: int, weights: int
) -> None:
    asked: list[Kind] = []

    def without(x: torch.Tensor, kind: Kind) -> str:
        asked.append(kind)
        return ""

    monkeypatch.setattr(cuda, "_without", without)
    x, scale = torch.randn(2, length), torch.rand(())
    assert not row_reasons("quantize_rows", x, "token", True, -127, 127)
    assert not row_reasons("quantize_static", x, scale, None, -127, 127)
    assert [kind.block for kind in asked] == [block] * 2
    for columns in (15, 16):
        call = Calls(length, (2, length), SINGLE).weight_only(columns, length, False)
        assert not row_reasons("dequant_linear", *call)
        assert asked[-1].block == weights
        site = Calls(length, (2, length), SINGLE).site(columns, 0, False)
        assert not row_reasons("int_linear", *site, 0, False)
        product = Calls(length, (1, 2), SINGLE).product(length, columns)
        assert not row_reasons("int_product", *product)
        assert [kind.columns for kind in asked[-2:]] == [16 * (columns == 16)] * 2
    assert {kind.length for kind in asked} == {1 if length == 1 else 16 * (length % 16 == 0)}


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cuda.missing_library.__wrapped__() == (
        "triton is not installed: pip install 'fxquant[cuda]'"
    )
