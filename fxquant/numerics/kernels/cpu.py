"""Fused operators on the CPU: blocks of rows that stay in its caches, and its int8 instructions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxquant.formats.packing import unpack_int4
from fxquant.numerics import cpu_int8, gemm, quantization

# Bytes of fp32 that a block of rows takes: what stays in a cache between two operations.
_BLOCK_BYTES = 2**21
# Sums for which a pass costs more than a look at their scales.
_WORTH_ASKING = 2**16


def always(*operands: Any) -> str:
    return ""


def without_int8(*operands: Any) -> str:
    """Why the processor's int8 GEMM does not take the call."""
    return "" if cpu_int8.exact_int_mm() else "this processor has no exact int8 GEMM"


def without_float_sums(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    weight_sum: Tensor | None,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    nan: Tensor,
    chunk: int,
    packed: bool,
) -> str:
    """Why one fp32 GEMM does not hold the sums as they are rescaled."""
    if chunk:
        return "the sums may need more than fp32's 24 bits"
    if zero_point is not None or weight_zero_point is not None:
        return "zero points are corrected in int32"
    if gemm.exact_dtype("cpu") != torch.float32:
        return "autocast or a reduced precision is on"
    return ""


def without_views(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    packed: bool,
) -> str:
    """Why the weight does not divide into groups of equal size."""
    if weight_scale.dim() == 0:
        return "one scale for the whole weight"
    if group_size and x.shape[-1] % group_size:
        return f"{x.shape[-1]} columns are no whole number of groups of {group_size}"
    return ""


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    size = max(16, _BLOCK_BYTES // (4 * max(columns, 1)))
    return (slice(start, start + size) for start in range(0, rows, size))


def _of_rows(values: Tensor) -> Tensor:
    """[..., 1] as [M, 1]; () as it is."""
    return values if values.dim() == 0 else values.reshape(-1, 1)


def _block(values: Tensor, rows: slice) -> Tensor:
    return values if values.dim() == 0 else values[rows]


def quantize_rows(
    x: Tensor, granularity: str, symmetric: bool, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], 1)
    # Its own range holds x: without a zero point nothing is left to clamp.
    ends = None if symmetric else (qmin, qmax)
    if granularity == "tensor":
        low, high = _ends(rows)
        scale, zero_point = _range(low.amin(), high.amax(), symmetric, qmin, qmax)
        codes = _encoded(rows, scale, None if symmetric else zero_point, ends)
        return codes.view(x.shape), scale, zero_point, _nan_of(high).view(shape)
    codes = torch.empty(rows.shape, dtype=torch.int8)
    nan = torch.empty((len(rows), 1), dtype=x.dtype)
    scale, zero_point = (torch.empty_like(nan, dtype=t) for t in (torch.float32, torch.int32))
    for block in _blocks(*rows.shape):
        wide = rows[block].to(torch.float32)  # once, for the range and the codes
        low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
        scale[block], zero_point[block] = _range(low, high, symmetric, qmin, qmax)
        nan[block] = _nan_of(high)
        shift = None if symmetric else zero_point[block]
        _encode(rows[block], wide, codes[block], scale[block], shift, ends)
    return codes.view(x.shape), scale.view(shape), zero_point.view(shape), nan.view(shape)


def quantize_static(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    codes = torch.empty(rows.shape, dtype=torch.int8)
    nan = torch.empty((len(rows), 1), dtype=x.dtype)
    for block in _blocks(*rows.shape):
        wide = rows[block].to(torch.float32)
        nan[block] = _nan_of(wide.amax(-1, keepdim=True))
        _encode(rows[block], wide, codes[block], scale, zero_point, (qmin, qmax))
    return codes.view(x.shape), nan.view(*x.shape[:-1], 1)


def _range(
    low: Tensor, high: Tensor, symmetric: bool, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    if not symmetric:
        return quantization.activation_qparams_from_range(low, high, qmin, qmax)
    scale = quantization.calc_qparams_symmetric(torch.maximum(high, -low), qmax, ())
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def _ends(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of each row, [M, 1], in its dtype: reductions in fp32 are vectorized,
    those of narrower floats are not."""
    low, high = (torch.empty((len(rows), 1), dtype=rows.dtype) for _ in range(2))
    for block in _blocks(*rows.shape):
        wide = rows[block].to(torch.float32)
        low[block], high[block] = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    return low, high


def _nan_of(largest: Tensor) -> Tensor:
    """0, and NaN where a row's maximum, which propagates it, is one."""
    return torch.zeros_like(largest).masked_fill_(torch.isnan(largest), torch.nan)


def _encoded(
    rows: Tensor, scale: Tensor, zero_point: Tensor | None, ends: tuple[int, int] | None
) -> Tensor:
    """Codes of all rows under one scale ()."""
    codes = torch.empty(rows.shape, dtype=torch.int8)
    for block in _blocks(*rows.shape):
        wide = rows[block].to(torch.float32)
        _encode(rows[block], wide, codes[block], scale, zero_point, ends)
    return codes


def _encode(
    rows: Tensor,
    wide: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    ends: tuple[int, int] | None,
) -> None:
    """The operations of numerics.quantization.encode into ``codes``; ``wide``, the rows in fp32, is
    written to where it is a copy of them."""
    steps = torch.div(wide, scale, out=None if rows.dtype == wide.dtype else wide).round_()
    if zero_point is not None:
        steps.add_(zero_point)
    if ends is not None:
        steps.clamp_(*ends)
    codes.copy_(steps)


def int8_linear(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    weight_sum: Tensor | None,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    nan: Tensor,
    chunk: int,
    packed: bool,
) -> Tensor:
    rows = codes.reshape(-1, codes.shape[-1])
    columns = unpack_int4(weight, rows.shape[1]) if packed else weight
    sums = cpu_int8.int_mm(rows, columns)
    if zero_point is not None and weight_sum is not None:
        sums.sub_(_of_rows(zero_point) * weight_sum)
    if weight_zero_point is not None:
        sums.sub_(weight_zero_point.flatten() * rows.sum(-1, keepdim=True, dtype=torch.int32))
    y = torch.empty(sums.shape, dtype=nan.dtype)
    _rescale(sums, _of_rows(scale), weight_scale.flatten(), bias, nan, y)
    return y.view(*codes.shape[:-1], y.shape[1])


def _rescale(
    sums: Tensor,
    scale: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    nan: Tensor,
    out: Tensor,
) -> None:
    """Scales, bias and NaN in fp32, then one cast into ``out``, a block of rows at a time."""
    nans = None if _is_nothing(nan, scale, weight_scale, sums) else nan.reshape(-1, 1)
    wide = None if bias is None else bias.to(torch.float32)
    room: Tensor | None = None
    for block in _blocks(*sums.shape):
        into = out[block]
        if out.dtype == torch.float32:
            work = into
        else:
            room = torch.empty(into.shape, dtype=torch.float32) if room is None else room
            work = room[: len(into)]
        work.copy_(sums[block]).mul_(_block(scale, block))
        if weight_scale is not None:
            work.mul_(weight_scale)
        if wide is not None:
            work.add_(wide)
        if nans is not None:
            work.add_(nans[block])
        if work is not into:
            into.copy_(work)


def _is_nothing(nan: Tensor, scale: Tensor, weight_scale: Tensor | None, sums: Tensor) -> bool:
    """Whether adding ``nan`` leaves every bit: it holds no NaN, and no result before it is -0.0,
    which + 0.0 would turn to 0.0: no product of whole numbers and scales is too small for fp32.
    Sums in floats may be -0.0 themselves, since a GEMM says nothing of the sign of a zero."""
    if weight_scale is None or sums.is_floating_point() or sums.numel() < _WORTH_ASKING:
        return False
    least, other = float(scale.amin()), float(weight_scale.amin())
    normal = min(least, other) > 0 and least * other >= torch.finfo(torch.float32).tiny
    return normal and not bool(torch.isnan(nan).any())


def float_linear(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    weight_sum: Tensor | None,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    nan: Tensor,
    chunk: int,
    packed: bool,
) -> Tensor:
    rows = codes.reshape(-1, codes.shape[-1])
    columns = unpack_int4(weight, rows.shape[1]) if packed else weight
    # Whole numbers below 2**24: what int32 would hold, without the way there and back.
    sums = torch.mm(rows.to(torch.float32), columns.to(torch.float32).t())
    y = torch.empty(sums.shape, dtype=nan.dtype)
    _rescale(sums, _of_rows(scale), weight_scale.flatten(), bias, nan, y)
    return y.view(*codes.shape[:-1], y.shape[1])


def int8_grouped(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    weight_sum: Tensor | None,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    nan: Tensor,
    group_size: int,
    packed: bool,
) -> Tensor:
    rows = codes.reshape(-1, codes.shape[-1])
    columns = unpack_int4(weight, rows.shape[1]) if packed else weight
    row_zero = None if zero_point is None else _of_rows(zero_point)
    total: Tensor | None = None
    groups = zip(rows.split(group_size, 1), columns.split(group_size, 1), strict=True)
    for g, (left, right) in enumerate(groups):
        sums = cpu_int8.int_mm(left, right)
        if row_zero is not None and weight_sum is not None:
            sums.sub_(row_zero * weight_sum.select(1, g))
        if weight_zero_point is not None:
            shift = weight_zero_point.select(1, g)
            sums.sub_(shift * left.sum(-1, keepdim=True, dtype=torch.int32))
        part = sums.to(torch.float32).mul_(weight_scale.select(1, g))
        total = part if total is None else total.add_(part)
    assert total is not None
    y = torch.empty(total.shape, dtype=nan.dtype)
    _rescale(total, _of_rows(scale), None, bias, nan, y)
    return y.view(*codes.shape[:-1], y.shape[1])


def dequantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    packed: bool,
) -> Tensor:
    length = x.shape[-1]
    codes = unpack_int4(weight, length) if packed else weight
    groups = weight_scale.shape[-1]
    # A copy also of fp32's own: it is written to.
    values = codes.unflatten(1, (groups, length // groups)).to(torch.float32)
    if weight_zero_point is not None:
        values.sub_(weight_zero_point.unsqueeze(-1))
    values.mul_(weight_scale.unsqueeze(-1))
    return torch.nn.functional.linear(x, values.flatten(1).to(x.dtype), bias)
