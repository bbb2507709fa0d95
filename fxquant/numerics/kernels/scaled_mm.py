"""FP8 products by ``torch._scaled_mm``: equivalent to the reference within a bound, not exact.

A product of two E4M3 codes is exact in float32, and the reference adds them exactly in float64. A
device adds them in float32 (oneDNN on CPUs) or in less: Hopper's FP8 instructions are published to
align the 32 products of a step, and the sum so far, to the largest of them and to keep about 13
bits below it (DeepSeek-V3, 2024), and cuBLAS moves to float32 after 128 columns as it is called
here. From that follows ``allowed``; each kind of call is held to it once a process, and runs as the
reference where it does not keep it.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.formats.floating import E4M3
from fxquant.numerics import quantization

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MULTIPLE = 16  # what torch and cuBLAS ask of K and of N
_NEEDS = (8, 9)  # compute capability
_ROWS, _COLUMNS = 24, 48  # of a first test
_STEP, _PROMOTED, _KEPT = 32, 128, 13  # columns of an instruction and of a sum, bits: see above


@dataclass(frozen=True)
class Kind:
    """What is asked apart: the result's dtype, K, one scale for all of each operand, a bias."""

    dtype: torch.dtype
    length: int
    single: bool
    biased: bool


def without_layout(x_grid: str, weight_grid: str, length: int, columns: int) -> str:
    """Why no device multiplies these codes [..., K] by [N, K] so; "" where one may."""
    if (x_grid, weight_grid) != (E4M3.name, E4M3.name):
        return f"{x_grid} by {weight_grid}, and torch._scaled_mm is asked for e4m3 by e4m3"
    if length % _MULTIPLE or columns % _MULTIPLE:
        return (
            f"a weight [{columns}, {length}], and torch._scaled_mm takes multiples of {_MULTIPLE}"
        )
    return ""


def without_scaled_mm(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    like: Tensor,
    x_grid: str,
    weight_grid: str,
) -> str:
    """Why torch does not take a call; operands as code_linear's."""
    columns, length = weight.shape
    layout = without_layout(x_grid, weight_grid, length, columns)
    if layout or not codes.numel() or not columns:
        return layout or "nothing to compute"
    if like.dtype not in _DTYPES:
        return f"no result in {like.dtype}"
    rows = codes.numel() // length
    if scale.numel() not in (1, rows) or weight_scale.numel() not in (1, columns):
        return "scales that are neither one for all nor one for each row"
    single = scale.numel() == weight_scale.numel() == 1
    kind = Kind(like.dtype, length, single, bias is not None)
    return _without_device(codes.device) or _beyond(kind, codes.device)


def code_linear(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    like: Tensor,
    x_grid: str,
    weight_grid: str,
) -> Tensor:
    """As torch.ops.fxquant.code_linear, up to the order and the bits in which a device adds."""
    rows, columns = codes.reshape(-1, codes.shape[-1]).contiguous(), weight.contiguous().t()
    nan = quantization.nan_rows(like).reshape(-1, 1)
    left, right = scale.reshape(-1, 1), weight_scale.reshape(1, -1)
    dtype = like.dtype
    if dtype == torch.float32 or (bias is not None and bias.dtype != dtype):
        # Row by row, float32 results are no device's everywhere, and none takes a bias with them.
        one = torch.ones((), device=codes.device)
        y = torch._scaled_mm(rows, columns, one, one, out_dtype=torch.float32)
        y = y.mul_(left).mul_(right)
        y = (y if bias is None else y.add_(bias)).add_(nan).to(dtype)
    elif left.numel() == right.numel() == 1:
        y = torch._scaled_mm(rows, columns, left, right, bias=bias, out_dtype=dtype).add_(nan)
    else:
        right = right.expand(1, weight.shape[0]).contiguous()
        y = torch._scaled_mm(rows, columns, left + nan, right, bias=bias, out_dtype=dtype)
    return y.view(*codes.shape[:-1], weight.shape[0])


def allowed(
    magnitude: Tensor, bias: Tensor | None, dtype: torch.dtype, length: int, device: str
) -> Tensor:
    """How far a result in ``dtype`` may be from the exact one; float64, as ``magnitude``.

    ``magnitude`` [M, N]: the sum of the magnitudes of ``length`` products, times both scales. The
    sums' share is what the module's text derives; the rest are at most four roundings, of scales,
    bias and casts.
    """
    added = length * 2.0**-24
    if device == "cuda":
        steps = _PROMOTED // _STEP
        added = steps * (_STEP + 1) * 2.0**-_KEPT + -(-length // _PROMOTED) * 2.0**-24
    whole = magnitude if bias is None else magnitude + bias.double().abs()
    limits = torch.finfo(dtype)
    return magnitude * added + whole * (2 * limits.eps) + limits.smallest_normal * limits.eps


@functools.cache
def _without_device(device: torch.device) -> str:
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < _NEEDS:
            needed = ".".join(map(str, _NEEDS))
            return f"compute capability {found[0]}.{found[1]}, and {needed} is needed"
    return ""


@functools.cache
def _beyond(kind: Kind, device: torch.device) -> str:
    """Why calls of this kind are not torch's: it has none here, or is further off than allowed."""
    try:
        reason = "" if _keeps(kind, device) else "torch._scaled_mm is further off than its bound"
    except (RuntimeError, ValueError, NotImplementedError) as error:
        text = " ".join(str(error).split())[:200]
        reason = f"torch._scaled_mm does not run here: {type(error).__name__}: {text}"
    if reason:
        warnings.warn(
            f"{reason} ({kind} on {device}); the reference runs instead, slower and exact",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def _keeps(kind: Kind, device: torch.device) -> bool:
    """Whether random numbers, rows and columns of one sign among them, come out within bounds."""
    generator = torch.Generator().manual_seed(0)

    def codes(rows: int) -> Tensor:
        values = torch.randn(rows, kind.length, generator=generator).mul_(16)
        values[::2] = values[::2].abs()  # no cancellation: the bound is a small share of the sum
        values[:, 0] *= 20  # what lies far below the largest product is what is dropped
        return E4M3.encode(E4M3.nearest_(values))

    x, weight = codes(_ROWS), codes(_COLUMNS)
    scales = [torch.rand(each, 1, generator=generator).add_(0.5).mul_(2.0**-9)
              for each in ((1, 1) if kind.single else (_ROWS, _COLUMNS))]  # fmt: skip
    bias = torch.randn(_COLUMNS, generator=generator).to(kind.dtype) if kind.biased else None
    like = x.to(kind.dtype)
    like[-1, -1] = torch.nan
    operands = (x, weight, *scales, bias, like, E4M3.name, E4M3.name)
    there: list[Any] = [e.to(device) if isinstance(e, Tensor) else e for e in operands]
    found = code_linear(*there).cpu().double()
    numbers, rows, columns = x.double(), scales[0].double(), scales[1].double().t()
    wanted = numbers @ weight.double().t() * rows * columns
    magnitude = numbers.abs() @ weight.double().abs().t() * rows * columns
    bound = allowed(magnitude, bias, kind.dtype, kind.length, device.type)
    wanted = wanted if bias is None else wanted + bias.double()
    near = (found - wanted).abs() <= bound
    return bool(near[:-1].all()) and bool(found[-1].isnan().all())
