"""The CPU's own int8 GEMM, where it has one and is exact: ``torch._int_mm`` through oneDNN.

With VNNI or AMX, oneDNN sums products of int8 in int32 without a step between. Without them it goes
through 16-bit sums of two products, which saturate: there it is neither exact nor fast. Which one a
process gets depends on the processor, on oneDNN's build and on its environment, so the processor is
asked first and the kernel itself second: once a process, on codes that saturation would change.
"""

from __future__ import annotations

import functools
import math
import warnings

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fxquant.numerics.gemm import reference_int_gemm

# Rows, length, columns: a vector, odd tails, a block of the kernel and more.
_SHAPES = ((1, 64, 48), (3, 67, 33), (16, 1024, 64), (65, 257, 130))


def exact_int_mm() -> bool:
    """Whether ``torch._int_mm`` on the CPU takes the processor's int8 instructions and is exact."""
    return bool(torch.backends.mkldnn.enabled) and _tested()


@functools.cache
def _tested() -> bool:
    has_instructions = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    if not has_instructions:
        return False
    # The first call may come from inside a compiler's or FakeTensor's mode.
    with _disable_current_modes():
        wrong = [shape for shape in _SHAPES if not _agrees(*shape)]
    if wrong:
        warnings.warn(
            "the CPU's int8 GEMM (torch._int_mm) differs from int64 sums at [rows, length, "
            f"columns] {list(wrong[0])}; integer GEMMs run in float32 instead, slower and exact",
            RuntimeWarning,
            stacklevel=2,
        )
    return not wrong


def _agrees(rows: int, length: int, columns: int) -> bool:
    """Against int64, on the largest codes in every combination of signs and on mixed ones."""
    count = max(rows, columns) * length
    mixed, other = (
        torch.arange(count, device="cpu").mul(step).remainder(256).sub(128).to(torch.int8)
        for step in (37, 91)
    )
    ends = [torch.full((count,), value, dtype=torch.int8, device="cpu") for value in (127, -128)]
    pairs = (
        (x[: rows * length].view(rows, length), w[: columns * length].view(columns, length))
        for x in (*ends, mixed)
        for w in (*ends, other)
    )
    return all(
        torch.equal(torch._int_mm(x, w.t()).to(torch.int64), reference_int_gemm(x, w))
        for x, w in pairs
    )


def int_mm(x_codes: Tensor, weight_codes: Tensor) -> Tensor:
    """int32 [M, N] of int8 [M, K] by [N, K]; exact where ``exact_int_mm()`` holds."""
    if x_codes.shape[1] == 1:
        return _outer(x_codes, weight_codes.t())
    return torch._int_mm(_laid_out(x_codes), _laid_out(weight_codes).t())


def _laid_out(codes: Tensor) -> Tensor:
    """The matrix itself where its rows or its columns lie whole, one behind the other; else a copy.

    Of other layouts, such as an expanded one, _int_mm takes wrong numbers (torch 2.13).
    """
    (rows, columns), (down, across) = codes.shape, codes.stride()
    if (across == 1 and down >= columns) or (down == 1 and across >= rows):
        return codes
    return codes.contiguous()


def _outer(left_codes: Tensor, right_codes: Tensor) -> Tensor:
    """int32 [..., M, N] of [..., M, 1] by [..., 1, N]: _int_mm is wrong there (torch 2.13)."""
    return left_codes.to(torch.int32) * right_codes.to(torch.int32)


def batched_int_mm(left_codes: Tensor, right_codes: Tensor) -> Tensor:
    """int32 [..., M, N] of int8 [..., M, K] by [..., K, N], one GEMM after another."""
    if left_codes.shape[-1] == 1:
        return _outer(left_codes, right_codes)
    batch = torch.broadcast_shapes(left_codes.shape[:-2], right_codes.shape[:-2])
    count = math.prod(batch)
    lefts, rights = (
        codes.expand(*batch, *codes.shape[-2:]).reshape(count, *codes.shape[-2:])
        for codes in (left_codes, right_codes)
    )
    shape = (*batch, left_codes.shape[-2], right_codes.shape[-1])
    sums = torch.empty(shape, dtype=torch.int32, device=left_codes.device)
    for left, right, out in zip(lefts, rights, sums.view(count, *shape[-2:]), strict=True):
        torch._int_mm(_laid_out(left), _laid_out(right), out=out)
    return sums
