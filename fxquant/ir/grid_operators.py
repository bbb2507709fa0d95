"""Operators of ``torch.ops.fxquant`` for grids that are no integer's and for groups of an input.

``grid`` and ``scale`` operands are names out of fxquant/formats/table.py. ``operators`` registers
what stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxquant.formats.grid import Grid
from fxquant.formats.table import grid_named, scales_named
from fxquant.numerics import code_products, quantization
from fxquant.numerics.quantizer import largest_of


def choose_scale(x: Tensor, granularity: str, grid: str) -> Tensor:
    """Dynamic scale (fp32) for a grid that is no integer's: () or, for "token", [..., 1]."""
    reach = grid_named(grid).reach
    return quantization.calc_qparams_symmetric(x, reach, None if granularity == "tensor" else -1)


def choose_global_scale(x: Tensor, grid: str, scale: str) -> Tensor:
    """float32 (): what the scales of all groups of ``x`` share, where they have two levels."""
    found = scales_named(scale).global_scale(x.abs().amax(), grid_named(grid))
    if found is None:
        raise ValueError(f"scales in {scale} share none")
    return found


def choose_group_scales(
    x: Tensor, global_scale: Tensor | None, grid: str, scale: str, group_size: int
) -> Tensor:
    """Dynamic scales [..., G] of groups of the last dimension, as ``scale`` stores them."""
    stored = scales_named(scale)
    found = stored.scales(largest_of(x, group_size), grid_named(grid), global_scale)
    return stored.encode(found, global_scale)


def decode_scales(stored: Tensor, global_scale: Tensor | None, scale: str) -> Tensor:
    """float32: the scales that stored ones stand for."""
    found = scales_named(scale).decode(stored, global_scale)
    return found.clone() if found is stored else found


def quantize_to(x: Tensor, scale: Tensor, grid: str, group_size: int) -> Tensor:
    """Codes of ``x`` on a grid, granularity by the scale's shape; group_size 0: no groups."""
    found = grid_named(grid)
    spread = quantization.expand_groups(scale, x.shape[-1], group_size or None)
    return found.nearest_codes(torch.div(x.to(torch.float32), spread))


def decode(stored: Tensor, grid: str, length: int) -> Tensor:
    """float32 [..., length]: the numbers of a grid, before their scale.

    length 0: the codes are not packed.
    """
    found = grid_named(grid)
    return found.decode(found.unpack(stored, length) if length else stored)


def code_gemm(
    x_codes: Tensor,
    weight: Tensor,
    zero_point: Tensor | None,
    weight_zero_point: Tensor | None,
    x_grid: str,
    weight_grid: str,
) -> Tensor:
    """[..., N] of codes [..., K] by codes [N, K] as they are stored: sums of products of numbers.

    Zero points, where a grid has them, are subtracted first: the input's () or [..., 1], the
    weight's () or [N, 1]. float32 where that is exact, else float64: see numerics.code_products.
    """
    grids, length = (grid_named(x_grid), grid_named(weight_grid)), x_codes.shape[-1]
    dtype = code_products.exact_dtype(*grids, length)
    x = _input(x_codes, zero_point, grids[0]).to(dtype)
    blocks = code_products.row_blocks(weight.shape[0], *grids, length)
    parts = [
        code_products.product(x, _rows(weight, weight_zero_point, rows, grids[1], length, 0), dtype)
        for rows in blocks
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def grouped_code_gemm(
    x_codes: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    zero_point: Tensor | None,
    weight_zero_point: Tensor | None,
    x_grid: str,
    weight_grid: str,
    x_group: int,
    weight_group: int,
) -> Tensor:
    """fp32 [..., N]: the sums of each group of K, rescaled by the group's scales, added in order.

    x_scale [..., G] and weight_scale [N, G] are those of groups of ``x_group`` and ``weight_group``
    columns, None and 0 where an operand has none; weight_zero_point is () [N, 1] or [N, G]. Where
    the groups differ, sums are over what lies in one group of each.
    """
    grids, length = (grid_named(x_grid), grid_named(weight_grid)), x_codes.shape[-1]
    x = _input(x_codes, zero_point, grids[0])
    runs = list(code_products.runs(length, x_group, weight_group))
    parts = []
    for rows in code_products.row_blocks(weight.shape[0], *grids, length):
        w = _rows(weight, weight_zero_point, rows, grids[1], length, weight_group)
        scale = None if weight_scale is None else weight_scale.narrow(0, *rows)
        total: Tensor | None = None
        for start, end in runs:
            dtype = code_products.exact_dtype(*grids, end - start)
            xs, ws = (each.narrow(-1, start, end - start) for each in (x, w))
            part = code_products.product(xs, ws, dtype).to(torch.float32)
            if scale is not None:
                part = part * scale.select(-1, start // weight_group)
            if x_scale is not None:
                part = part * x_scale.narrow(-1, start // x_group, 1)
            total = part if total is None else total.add_(part)
        assert total is not None
        parts.append(total)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def code_matmul(left_codes: Tensor, right_codes: Tensor, left_grid: str, right_grid: str) -> Tensor:
    """[..., M, N] of codes [..., M, K] by [..., K, N], both activations': sums of products.

    float32 where that is exact, else float64, as code_gemm.
    """
    grids = grid_named(left_grid), grid_named(right_grid)
    left, right = grids[0].decode(left_codes), grids[1].decode(right_codes)
    dtype = code_products.exact_dtype(*grids, left.shape[-1])
    return code_products.batched_product(left, right, dtype)


def store_kv_to(x: Tensor, grid: str) -> Tensor:
    """``x`` [batch, heads, tokens, width] as a cache of codes on a grid would give it back.

    One scale for each token and head (its last dimension), symmetric, in x's dtype. Its gradient
    is x's own.
    """
    found = grid_named(grid)
    scale = quantization.calc_qparams_symmetric(x, found.reach, -1)
    steps = torch.div(x.detach().to(torch.float32), scale.detach())
    return quantization.straight_through(x, found.nearest_(steps).mul_(scale.detach()).to(x.dtype))


def _input(codes: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """float32 [..., K]: the numbers of an input's codes, less its zero point."""
    x = grid.decode(codes)
    return x if zero_point is None else x - zero_point


def _rows(
    weight: Tensor,
    zero_point: Tensor | None,
    rows: tuple[int, int],
    grid: Grid,
    length: int,
    group: int,
) -> Tensor:
    """float32 [n, K]: the numbers of some rows of a weight, less their zero points."""
    w = grid.decode(grid.unpack(weight.narrow(0, *rows), length))
    if zero_point is None:
        return w
    shift = zero_point.narrow(0, *rows) if zero_point.dim() else zero_point
    return w - (quantization.expand_groups(shift, length, group) if group else shift)


COMPOSITE: dict[str, Callable[..., Any]] = {
    "choose_scale(Tensor x, str granularity, str grid) -> Tensor": choose_scale,
    "choose_global_scale(Tensor x, str grid, str scale) -> Tensor": choose_global_scale,
    "choose_group_scales(Tensor x, Tensor? global_scale, str grid, str scale, int group_size)"
    " -> Tensor": choose_group_scales,
    "decode_scales(Tensor stored, Tensor? global_scale, str scale) -> Tensor": decode_scales,
    "quantize_to(Tensor x, Tensor scale, str grid, int group_size) -> Tensor": quantize_to,
    "decode(Tensor stored, str grid, int length) -> Tensor": decode,
    "code_gemm(Tensor x_codes, Tensor weight, Tensor? zero_point, Tensor? weight_zero_point,"
    " str x_grid, str weight_grid) -> Tensor": code_gemm,
    "grouped_code_gemm(Tensor x_codes, Tensor weight, Tensor? x_scale, Tensor? weight_scale,"
    " Tensor? zero_point, Tensor? weight_zero_point, str x_grid, str weight_grid, int x_group,"
    " int weight_group) -> Tensor": grouped_code_gemm,
    "code_matmul(Tensor left_codes, Tensor right_codes, str left_grid, str right_grid)"
    " -> Tensor": code_matmul,
    "store_kv_to(Tensor x, str grid) -> Tensor": store_kv_to,
}
