"""Products of codes on any two grids, exact wherever a certificate says so.

Every number of a grid is a multiple of its quantum. So a sum of K products is a multiple of the
product of both quanta, and it is exact, in whatever order it is added, while K times the largest
product stays within 2^53 of these (float64) or 2^24 (float32). E4M3 by E4M3: float64 to K =
171,000; E2M1 by E2M1: float32 to K = 116,508. E5M2 by itself and NF4 have no such bound worth
having: float64 rounds their sums, to 53 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fxquant.formats.grid import Grid
from fxquant.numerics import gemm

BLOCK = 2**22  # numbers of a weight that stand at once


def exact_length(x: Grid, weight: Grid, digits: int) -> int:
    """The longest K whose sums of products are exact in a float of ``digits`` binary digits."""
    return int(2**digits // (_steps(x) * _steps(weight)))


def _steps(grid: Grid) -> float:
    """The largest magnitude in quanta, of what is left once a zero point is subtracted."""
    if grid.has_zero_point:
        return (grid.highest - grid.lowest) / grid.quantum
    return max(-grid.lowest, grid.highest) / grid.quantum


def exact_dtype(x: Grid, weight: Grid, length: int) -> torch.dtype:
    """float32 where K = ``length`` is exact in it, else float64, the widest there is."""
    return torch.float32 if length <= exact_length(x, weight, 24) else torch.float64


def row_blocks(rows: int, x: Grid, weight: Grid, length: int) -> Iterator[tuple[int, int]]:
    """(first, count) of a weight's rows whose numbers stand at once, for sums of ``length``.

    Its codes are decoded at each product, since the numbers take 4 to 16 times their memory; in
    blocks they never all stand at once. Sums that are rounded might be added in another order then:
    such a weight is one block.
    """
    exact = length <= exact_length(x, weight, 53)
    size = max(1, BLOCK // max(1, length)) if exact else max(1, rows)
    return ((first, min(size, rows - first)) for first in range(0, max(1, rows), size))


def runs(length: int, x_group: int, weight_group: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the columns that lie in one group of each operand; group 0: the whole K."""
    size = math.gcd(x_group, weight_group)
    yield from pairwise((*range(0, length, size), length))


def product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T`` [..., N] of float32 [..., K] and [N, K], in ``dtype`` or wider."""
    dtype = _at_least(dtype, x.device)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    sums = torch.mm(rows, weight.to(dtype).t())
    return sums.view(*x.shape[:-1], weight.shape[0])


def batched_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` of float32 [..., M, K] and [..., K, N], in ``dtype`` or wider."""
    dtype = _at_least(dtype, left.device)
    return torch.matmul(left.to(dtype), right.to(dtype))


def _at_least(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """float64 where the user's settings let products of float32 be something less."""
    return gemm.exact_dtype(device.type) if dtype == torch.float32 else dtype
