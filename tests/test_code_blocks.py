"""Weights whose numbers are made some rows at a time: the same bits, never all numbers at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.analysis.inspection import site_view
from fxquant.formats.grid import Grid
from fxquant.formats.table import GRIDS
from fxquant.ir.legal_forms import OPS
from fxquant.numerics import code_products
from tests.architectures import llama

ROWS, LENGTH, COLUMNS = 5, 48, 37
PAIRS = [("e4m3", "e4m3"), ("e4m3", "e2m1"), ("int8-asym", "int4-asym"), ("int8", "e3m2")]


def codes(grid: Grid, *shape: int) -> Tensor:
    steps = torch.randn(shape) * grid.highest / 2
    return grid.encode(grid.nearest_(steps))


def stored(grid: Grid, *shape: int) -> Tensor:
    found = codes(grid, *shape)
    return grid.pack(found) if grid.packed else found


def operands(x: str, weight: str, group: int) -> tuple[Any, ...]:
    """Of code_gemm (group 0) or grouped_code_gemm."""
    grids = GRIDS[x], GRIDS[weight]
    groups = LENGTH // group if group else 1
    zero = torch.randint(-8, 8, (ROWS, 1)).int() if grids[0].has_zero_point else None
    shift = torch.randint(-8, 8, (COLUMNS, groups)).int() if grids[1].has_zero_point else None
    first = (codes(grids[0], ROWS, LENGTH), stored(grids[1], COLUMNS, LENGTH))
    if not group:
        return (*first, zero, shift, x, weight)
    scales = torch.rand(ROWS, groups), torch.rand(COLUMNS, groups)
    return (*first, *scales, zero, shift, x, weight, group, group)


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize(("x", "weight"), PAIRS)
def test_blocks_of_rows_change_no_bit(
    x: str, weight: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = OPS.grouped_code_gemm if group else OPS.code_gemm
    given = operands(x, weight, group)
    whole, sizes, product = call(*given), [], code_products.product

    def watched(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        sizes.append(right.shape[0])
        return product(left, right, dtype)

    monkeypatch.setattr(code_products, "BLOCK", 7 * LENGTH + 3)
    monkeypatch.setattr(code_products, "product", watched)
    found = call(*given)
    assert found.shape == (ROWS, COLUMNS)
    assert torch.equal(found, whole)
    assert max(sizes) == 7
    assert sum(sizes) == COLUMNS * (LENGTH // group if group else 1)


@pytest.mark.parametrize("x", ["nf4", "e5m2"])
def test_sums_that_are_rounded_are_of_one_block(x: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_products, "BLOCK", 7 * LENGTH)
    for other in (x, "nf4"):
        blocks = list(code_products.row_blocks(COLUMNS, GRIDS[x], GRIDS[other], LENGTH))
        assert blocks == [(0, COLUMNS)]


@pytest.mark.parametrize("scheme", ["w4-g12", "fp8", "wnvfp4"])
def test_a_page_counts_codes_in_blocks(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fxquant.convert(llama(num_hidden_layers=1), scheme)
    path = "model.layers.0.mlp.down_proj"
    whole = str(fxquant.inspect(graph).site(path))
    monkeypatch.setattr(site_view, "_NUMBERS", 100)
    assert str(fxquant.inspect(graph).site(path)) == whole
    assert "of the weight (bars logarithmic)" in whole
