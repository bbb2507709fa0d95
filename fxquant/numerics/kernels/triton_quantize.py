"""Triton kernels that make codes of rows, in the very operations of numerics.quantization.

Compiled with ``enable_fp_fusion=False``, so that a product and a sum stay two roundings; ``div_rn``
is the IEEE quotient, which ``/`` is not. Adding and taking away 1.5 * 2**23 rounds half to even as
rint does, where it matters: larger quotients are clamped. NaN is kept beside: a maximum drops it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxquant.numerics.kernels.tiles import laid_out, row_block
from fxquant.numerics.quantization import activation_qparams_from_range, calc_qparams_symmetric

NAN = tl.constexpr(float("nan"))
HALF_WAY = tl.constexpr(12582912.0)
MIN_SCALE = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _safe(scale):
    return tl.where(scale == 0, 1.0, tl.maximum(scale, MIN_SCALE))


@triton.jit
def _row_ends(x, length, BLOCK: tl.constexpr):
    """Smallest and largest number of a row and 0, and whether it holds NaN."""
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = tl.load(x + at, mask=at < length, other=0.0).to(tl.float32)
        bad = tl.maximum(bad, (v != v).to(tl.int32))
        low = tl.minimum(low, v)
        high = tl.maximum(high, v)
    return tl.min(low, 0), tl.max(high, 0), tl.max(bad, 0) > 0


@triton.jit
def _store_codes(
    x, codes, scale, zero_point, length, QMIN: tl.constexpr, QMAX: tl.constexpr, BLOCK: tl.constexpr
):
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = tl.load(x + at, mask=at < length, other=0.0).to(tl.float32)
        t = (tl.div_rn(v, scale) + HALF_WAY) - HALF_WAY + zero_point
        t = tl.where(t != t, 0.0, tl.minimum(tl.maximum(t, QMIN * 1.0), QMAX * 1.0))
        tl.store(codes + at, t.to(tl.int8), mask=at < length)


@triton.jit
def token_kernel(
    x, codes, scales, zero_points, nans, length,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its range, its scale and zero point, its codes."""
    row = tl.program_id(0).to(tl.int64)
    low, high, bad = _row_ends(x + row * length, length, BLOCK)
    if SYMMETRIC:
        scale = _safe(tl.div_rn(tl.maximum(high, -low), QMAX * 1.0))
        zero = scale * 0.0
    else:
        steps = (QMAX - QMIN) * 1.0
        scale = _safe(tl.div_rn(high, steps) - tl.div_rn(low, steps))
        zero = QMIN - tl.div_rn(low, scale)
        zero = (zero + HALF_WAY) - HALF_WAY
        # Of an infinite range it is NaN, which a minimum drops and CUDA makes 0 of.
        bad_zero = zero != zero
        zero = tl.minimum(tl.maximum(zero, QMIN * 1.0), QMAX * 1.0)
        zero = tl.where(bad_zero | bad, 0.0, zero)
    scale = tl.where(bad, NAN, scale)
    tl.store(scales + row, scale)
    tl.store(zero_points + row, zero.to(tl.int32))
    tl.store(nans + row, tl.where(bad, NAN, 0.0))
    _store_codes(x + row * length, codes + row * length, scale, zero, length, QMIN, QMAX, BLOCK)


@triton.jit
def ends_kernel(x, lows, highs, nans, length, BLOCK: tl.constexpr):
    """One row: its ends, NaN where it holds one."""
    row = tl.program_id(0).to(tl.int64)
    low, high, bad = _row_ends(x + row * length, length, BLOCK)
    tl.store(lows + row, tl.where(bad, NAN, low))
    tl.store(highs + row, tl.where(bad, NAN, high))
    tl.store(nans + row, tl.where(bad, NAN, 0.0))


@triton.jit
def static_kernel(
    x, codes, nans, scale, zero_point, length,
    QMIN: tl.constexpr, QMAX: tl.constexpr, AFFINE: tl.constexpr, FIND_NAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its codes under the one scale of all."""
    row = tl.program_id(0).to(tl.int64)
    shift = tl.load(zero_point).to(tl.float32) if AFFINE else 0.0
    if FIND_NAN:
        _, _, bad = _row_ends(x + row * length, length, BLOCK)
        tl.store(nans + row, tl.where(bad, NAN, 0.0))
    start = row * length
    _store_codes(x + start, codes + start, tl.load(scale), shift, length, QMIN, QMAX, BLOCK)


def _launch(length: int) -> dict[str, Any]:
    block = row_block(length)
    return {"BLOCK": block, "num_warps": min(8, block // 128), "enable_fp_fusion": False}


def quantize_rows(
    x: Tensor, granularity: str, symmetric: bool, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As torch.ops.fxquant.quantize_rows."""
    rows = laid_out(x.reshape(-1, x.shape[-1]))
    count, length = rows.shape
    shape = (*x.shape[:-1], 1)
    nans = rows.new_empty(count)
    codes = torch.empty_like(rows, dtype=torch.int8)
    if granularity == "token":
        scale = torch.empty(count, dtype=torch.float32, device=x.device)
        zero_point = torch.empty_like(scale, dtype=torch.int32)
        if count:
            token_kernel[(count,)](
                rows, codes, scale, zero_point, nans, length, qmin, qmax, symmetric,
                **_launch(length),
            )  # fmt: skip
        return codes.view(x.shape), scale.view(shape), zero_point.view(shape), nans.view(shape)
    low = torch.empty(count, dtype=torch.float32, device=x.device)
    high = torch.empty_like(low)
    ends_kernel[(count,)](rows, low, high, nans, length, **_launch(length))
    if symmetric:
        scale = calc_qparams_symmetric(torch.maximum(high, -low).amax(), qmax, ())
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        scale, zero_point = activation_qparams_from_range(low.amin(), high.amax(), qmin, qmax)
    _static(rows, codes, nans, scale, None if symmetric else zero_point, qmin, qmax, False)
    return codes.view(x.shape), scale, zero_point, nans.view(shape)


def quantize_static(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """As torch.ops.fxquant.quantize_static."""
    rows = laid_out(x.reshape(-1, x.shape[-1]))
    nans = rows.new_empty(rows.shape[0])
    codes = torch.empty_like(rows, dtype=torch.int8)
    _static(rows, codes, nans, scale, zero_point, qmin, qmax, True)
    return codes.view(x.shape), nans.view(*x.shape[:-1], 1)


def _static(
    rows: Tensor,
    codes: Tensor,
    nans: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    find_nan: bool,
) -> None:
    count, length = rows.shape
    if count:
        affine = zero_point is not None
        scale = laid_out(scale)
        shift = scale if zero_point is None else laid_out(zero_point)
        static_kernel[(count,)](
            rows, codes, nans, scale, shift, length, qmin, qmax, affine, find_nan,
            **_launch(length),
        )  # fmt: skip
