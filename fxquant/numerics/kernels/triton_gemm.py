"""Triton kernels that multiply codes and finish in their epilogue, and one that makes weights.

int32 sums are exact in any order; what follows is the plain operators' fp32 in their order, with
``enable_fp_fusion=False`` (see triton_quantize). Both operands are K-major, as x [M, K] and the
weight [N, K] are stored, which is what int8 tensor cores read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxquant.numerics.kernels.tiles import laid_out, tile, turned, weight_block


@triton.jit
def _tile(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Rows and columns of this program: GROUP tiles of rows side by side share the weight."""
    program = tl.program_id(0)
    across = tl.cdiv(N, BN)
    strip = program // (GROUP * across)
    height = tl.minimum(tl.cdiv(M, BM) - strip * GROUP, GROUP)
    within = program % (GROUP * across)
    m = (strip * GROUP + within % height) * BM + tl.arange(0, BM)
    n = (within // height) * BN + tl.arange(0, BN)
    return m, n


@triton.jit
def _codes(x, m, k, M, K, end):
    inside = (m[:, None] < M) & (k[None, :] < end)
    return tl.load(x + m[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0)


@triton.jit
def _weights(w, n, start, N, K, end, BK: tl.constexpr, PACKED: tl.constexpr):
    """int8 [BN, BK] of columns from ``start``, an even one where two share a byte."""
    row = n[:, None].to(tl.int64)
    if PACKED:
        at = start // 2 + tl.arange(0, BK // 2)
        inside = (n[:, None] < N) & (at[None, :] * 2 < end)
        both = tl.load(w + row * ((K + 1) // 2) + at[None, :], mask=inside, other=0).to(tl.int32)
        # x ^ 8 - 8 carries the sign of four bits down.
        low = ((both & 0xF) ^ 8) - 8
        high = ((both >> 4) ^ 8) - 8
        codes = tl.interleave(low, high).to(tl.int8)
    else:
        k = start + tl.arange(0, BK)
        inside = (n[:, None] < N) & (k[None, :] < end)
        codes = tl.load(w + row * K + k[None, :], mask=inside, other=0)
    return codes


@triton.jit
def _finish(f, m, n, y, bias, nan, M, N, HAS_BIAS: tl.constexpr):
    """Bias and NaN, one cast."""
    if HAS_BIAS:
        f = f + tl.load(bias + n, mask=n < N, other=0.0)[None, :].to(tl.float32)
    f = f + tl.load(nan + m, mask=m < M, other=0.0)[:, None].to(tl.float32)
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(y + m[:, None].to(tl.int64) * N + n[None, :], f.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "x_stride", "w_stride", "zero_stride", "shift_stride"])
def linear_kernel(
    x, w, y, x_scale, w_scale, zero, w_sum, shift, bias, nan, M, N, K,
    x_stride, w_stride, zero_stride, shift_stride,
    HAS_ZERO: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of int_linear."""
    m, n = _tile(M, N, BM, BN, GROUP)
    acc = tl.zeros([BM, BN], tl.int32)
    x_sum = tl.zeros([BM], tl.int32)
    for start in range(0, K, BK):
        a = _codes(x, m, start + tl.arange(0, BK), M, K, K)
        b = _weights(w, n, start, N, K, K, BK, PACKED)
        acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
        if HAS_SHIFT:
            x_sum += tl.sum(a.to(tl.int32), 1)
    if HAS_ZERO:
        z = tl.load(zero + m * zero_stride, mask=m < M, other=0)
        acc -= z[:, None] * tl.load(w_sum + n, mask=n < N, other=0)[None, :]
    if HAS_SHIFT:
        s = tl.load(shift + n * shift_stride, mask=n < N, other=0)
        acc -= s[None, :] * x_sum[:, None]
    f = acc.to(tl.float32) * tl.load(x_scale + m * x_stride, mask=m < M, other=0.0)[:, None]
    f = f * tl.load(w_scale + n * w_stride, mask=n < N, other=0.0)[None, :]
    _finish(f, m, n, y, bias, nan, M, N, HAS_BIAS)


@triton.jit(do_not_specialize=["M", "x_stride", "zero_stride", "groups"])
def grouped_kernel(
    x, w, y, x_scale, w_scale, zero, w_sum, shift, bias, nan, M, N, K,
    x_stride, zero_stride, groups, group_size,
    HAS_ZERO: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of grouped_int_linear: int32 within a group of K, fp32 from group to group."""
    m, n = _tile(M, N, BM, BN, GROUP)
    total = tl.zeros([BM, BN], tl.float32)
    for g in range(0, groups):
        end = tl.minimum((g + 1) * group_size, K)
        acc = tl.zeros([BM, BN], tl.int32)
        x_sum = tl.zeros([BM], tl.int32)
        for start in range(g * group_size, end, BK):
            a = _codes(x, m, start + tl.arange(0, BK), M, K, end)
            b = _weights(w, n, start, N, K, end, BK, PACKED)
            acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
            if HAS_SHIFT:
                x_sum += tl.sum(a.to(tl.int32), 1)
        at = n * groups + g
        if HAS_ZERO:
            z = tl.load(zero + m * zero_stride, mask=m < M, other=0)
            acc -= z[:, None] * tl.load(w_sum + at, mask=n < N, other=0)[None, :]
        if HAS_SHIFT:
            acc -= tl.load(shift + at, mask=n < N, other=0)[None, :] * x_sum[:, None]
        total += acc.to(tl.float32) * tl.load(w_scale + at, mask=n < N, other=0.0)[None, :]
    f = total * tl.load(x_scale + m * x_stride, mask=m < M, other=0.0)[:, None]
    _finish(f, m, n, y, bias, nan, M, N, HAS_BIAS)


@triton.jit(do_not_specialize=["M", "x_stride", "w_stride"])
def product_kernel(
    x, w, y, x_scale, w_scale, nan, M, N, K, x_stride, w_stride, TURNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of int_product, of one matrix [M, K] by [K, N], which lies in memory as [N, K] where
    TURNED."""
    batch = tl.program_id(1).to(tl.int64)
    m, n = _tile(M, N, BM, BN, GROUP)
    x += batch * M * K
    w += batch * N * K
    acc = tl.zeros([BM, BN], tl.int32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = _codes(x, m, k, M, K, K)
        inside = (n[:, None] < N) & (k[None, :] < K)
        if TURNED:
            at = n[:, None].to(tl.int64) * K + k[None, :]
        else:
            at = k[None, :].to(tl.int64) * N + n[:, None]
        b = tl.load(w + at, mask=inside, other=0)
        acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
    s = tl.load(x_scale + (batch * M + m) * x_stride, mask=m < M, other=0.0)
    f = acc.to(tl.float32) * s[:, None]
    f = f * tl.load(w_scale + (batch * N + n) * w_stride, mask=n < N, other=0.0)[None, :]
    _finish(f, m, n, y + batch * M * N, nan, nan + batch * M, M, N, False)


@triton.jit(do_not_specialize=["groups"])
def weight_kernel(
    w, out, scale, shift, K, groups, group_size,
    HAS_SHIFT: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some columns of one row of the weight, from codes to numbers."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PACKED:
        both = tl.load(w + row * ((K + 1) // 2) + k // 2, mask=k < K, other=0).to(tl.int32)
        code = ((both >> (k % 2 * 4) & 0xF) ^ 8) - 8
    else:
        code = tl.load(w + row * K + k, mask=k < K, other=0).to(tl.int32)
    at = row * groups + k // group_size
    if HAS_SHIFT:
        code -= tl.load(shift + at, mask=k < K, other=0)
    number = code.to(tl.float32) * tl.load(scale + at, mask=k < K, other=0.0)
    tl.store(out + row * K + k, number.to(out.dtype.element_ty), mask=k < K)


def _tiles(rows: int, length: int) -> dict[str, Any]:
    """What a product is compiled with: constants that its ``tile`` decides."""
    tall, deep = tile(rows, length)
    return {
        **{"BM": tall, "BN": 128, "BK": deep, "GROUP": 8},
        **{"num_warps": 8 if tall == 128 else 4, "num_stages": 3, "enable_fp_fusion": False},
    }


def _stride(values: Tensor | None) -> int:
    """0 for one value for all, 1 for one for each row."""
    return 0 if values is None or values.numel() == 1 else 1


def int_linear(
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
    """As torch.ops.fxquant.int_linear."""
    return _multiply(
        codes, weight, scale, weight_scale, zero_point, weight_sum, weight_zero_point, bias, nan,
        0, packed,
    )  # fmt: skip


def grouped_int_linear(
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
    """As torch.ops.fxquant.grouped_int_linear."""
    return _multiply(
        codes, weight, scale, weight_scale, zero_point, weight_sum, weight_zero_point, bias, nan,
        group_size, packed,
    )  # fmt: skip


def _multiply(
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
    """Both; group_size 0: no groups. What is missing is never read: another tensor stands there."""
    rows = laid_out(codes.reshape(-1, codes.shape[-1]))
    (M, K), N = rows.shape, weight.shape[0]
    y = torch.empty((M, N), dtype=nan.dtype, device=codes.device)
    if M and N:
        sums = None if zero_point is None else weight_sum
        given = (zero_point, sums, weight_zero_point, bias)
        others = (rows if each is None else laid_out(each) for each in given)
        tensors = (rows, laid_out(weight), y, *map(laid_out, (scale, weight_scale)))
        tensors = (*tensors, *others, laid_out(nan))
        flags = (zero_point is not None, weight_zero_point is not None, bias is not None, packed)
        tiles = _tiles(M, group_size or K)
        grid = (triton.cdiv(M, tiles["BM"]) * triton.cdiv(N, tiles["BN"]),)
        x_stride, w_stride, zero_stride = map(_stride, (scale, weight_scale, zero_point))
        if group_size:
            sizes = (M, N, K, x_stride, zero_stride, triton.cdiv(K, group_size), group_size)
            grouped_kernel[grid](*tensors, *sizes, *flags, **tiles)
        else:
            strides = (x_stride, w_stride, zero_stride, _stride(weight_zero_point))
            linear_kernel[grid](*tensors, M, N, K, *strides, *flags, **tiles)
    return y.view(*codes.shape[:-1], N)


def int_product(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, nan: Tensor
) -> Tensor:
    """As torch.ops.fxquant.int_product."""
    (M, K), N = left.shape[-2:], right.shape[-1]
    is_turned = turned(right)
    rows, columns = laid_out(left), laid_out(right.mT if is_turned else right)
    y = torch.empty((*left.shape[:-1], N), dtype=nan.dtype, device=left.device)
    if y.numel():
        tiles = _tiles(M, K)
        count = left.shape[:-2].numel()
        grid = (triton.cdiv(M, tiles["BM"]) * triton.cdiv(N, tiles["BN"]), count)
        product_kernel[grid](
            rows, columns, y, *map(laid_out, (left_scale, right_scale, nan)), M, N, K,
            *map(_stride, (left_scale, right_scale)), is_turned, **tiles,
        )  # fmt: skip
    return y


def dequantized_weight(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    length: int,
    group_size: int,
    packed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """[N, length] in ``dtype``: the numbers of a weight's codes; group_size 0: a scale each row."""
    count, groups = scale.shape
    out = torch.empty((count, length), dtype=dtype, device=weight.device)
    block = weight_block(length)
    shift = scale if zero_point is None else zero_point
    tensors = (laid_out(weight), out, laid_out(scale), laid_out(shift))
    weight_kernel[(count, triton.cdiv(length, block))](
        *tensors, length, groups, group_size or length, zero_point is not None, packed,
        BLOCK=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
