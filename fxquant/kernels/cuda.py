"""Fused operators on CUDA by Triton, an optional library: when it takes a call, and its first test.

Triton compiles for the device at hand and its versions differ, so each kernel is asked once a
process, in float32 with codes of a byte, on numbers that would show another rounding, before the
first call is theirs. What packed codes, shifts and half precision add is asked by the tests alone.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from fxquant.numerics import gemm, quantization

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST = 2**31  # elements, that a kernel counts in int32
_NEEDS = (8, 0)  # compute capability: int8 tensor cores as Triton knows them


def without_rows(x: Tensor, *rest: Any) -> str:
    """Why Triton does not make the codes of ``x``."""
    return _without(x, x.dtype) or ("" if x.numel() else "nothing to compute")


def without_gemm(codes: Tensor, weight: Tensor, *rest: Any) -> str:
    """Why Triton does not multiply; operands as int_linear's."""
    nan = rest[6]
    return _without(codes, nan.dtype) or _too_large(codes, weight)


def without_groups(codes: Tensor, weight: Tensor, *rest: Any) -> str:
    """The same for grouped_int_linear, whose groups begin at a whole byte."""
    group_size, packed = rest[-2:]
    if packed and group_size % 2:
        return f"groups of {group_size} codes begin in the middle of a byte"
    return without_gemm(codes, weight, *rest)


def without_dequantize(x: Tensor, weight: Tensor, weight_scale: Tensor, *rest: Any) -> str:
    """Why Triton does not make the weight's numbers; operands as dequant_linear's."""
    if weight_scale.dim() == 0:
        return "one scale for the whole weight"
    return _without(x, x.dtype)


def _too_large(left: Tensor, right: Tensor) -> str:
    sums = (left.numel() // max(1, left.shape[-1])) * right.shape[0]
    return f"{sums} sums or more" if max(sums, left.numel(), right.numel()) >= _LARGEST else ""


def _without(x: Tensor, dtype: torch.dtype) -> str:
    if dtype not in _DTYPES:
        return f"no kernel for {dtype}"
    return missing_library() or _without_device(x.device)


@functools.cache
def missing_library() -> str:
    """Why Triton cannot be used at all; "" where it is installed."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'fxquant[cuda]'"
    return ""


@functools.cache
def _without_device(device: torch.device) -> str:
    found = torch.cuda.get_device_capability(device)
    if found < _NEEDS:
        return f"compute capability {found[0]}.{found[1]}, and {_NEEDS[0]}.{_NEEDS[1]} is needed"
    try:
        wrong = differs(device)
    except Exception as error:  # no C compiler, a version that cannot: the composition runs
        reason = f"Triton does not run here: {type(error).__name__}: {error}"
        warnings.warn(
            f"{reason}; level kernels runs PyTorch's operators instead, slower and exact",
            RuntimeWarning,
            stacklevel=2,
        )
        return reason
    if wrong:
        warnings.warn(
            f"Triton's {wrong} gives other bits on {torch.cuda.get_device_name(device)} than "
            "PyTorch's operators; level kernels runs those instead, slower and exact",
            RuntimeWarning,
            stacklevel=2,
        )
    return f"its {wrong} is not exact here" if wrong else ""


def quantize_rows(*operands: Any) -> Any:
    from fxquant.kernels import triton_quantize

    with torch.cuda.device_of(operands[0]):  # Triton launches on the current device
        return triton_quantize.quantize_rows(*operands)


def quantize_static(*operands: Any) -> Any:
    from fxquant.kernels import triton_quantize

    with torch.cuda.device_of(operands[0]):  # Triton launches on the current device
        return triton_quantize.quantize_static(*operands)


def int_linear(*operands: Any) -> Any:
    from fxquant.kernels import triton_gemm

    with torch.cuda.device_of(operands[0]):  # Triton launches on the current device
        return triton_gemm.int_linear(*operands)


def grouped_int_linear(*operands: Any) -> Any:
    from fxquant.kernels import triton_gemm

    with torch.cuda.device_of(operands[0]):  # Triton launches on the current device
        return triton_gemm.grouped_int_linear(*operands)


def dequantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    packed: bool,
) -> Tensor:
    """The weight by one kernel, the product by the vendor's, as at level integer."""
    from fxquant.kernels import triton_gemm

    with torch.cuda.device_of(x):
        numbers = triton_gemm.dequantized_weight(
            weight, weight_scale, weight_zero_point, x.shape[-1], group_size, packed, x.dtype
        )
    return torch.nn.functional.linear(x, numbers, bias)


def differs(device: torch.device) -> str:
    """The first kernel that gives other bits than plain operators there; "" if none does."""
    from fxquant.kernels import triton_gemm

    rows, length, columns, group = 40, 200, 72, 64
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, length, generator=generator).mul_(3).to(device)
    x[1] *= 1e-42
    weight = torch.randint(-128, 128, (columns, length), generator=generator).to(torch.int8)
    scales = torch.rand(columns, 4, generator=generator).mul_(0.01).to(device)
    bias = torch.randn(columns, generator=generator).to(device)
    weight = weight.to(device)
    scale, zero = quantization.choose_qparams(x, -128, 127, symmetric=False, granularity="token")
    codes = quantization.encode(x, scale, zero, -128, 127)
    found = quantize_rows(x, "token", False, -128, 127)
    if not all(map(torch.equal, found[:3], (codes, scale, zero))):
        return "quantize_rows"
    static, wide = scale.max(), quantization.encode(x, scale.max(), None, -128, 127)
    if not torch.equal(quantize_static(x, static, None, -128, 127)[0], wide):
        return "quantize_static"
    one = scales.narrow(1, 0, 1).contiguous()
    numbers = weight.to(torch.float32) * one
    with torch.cuda.device_of(weight):
        kept = triton_gemm.dequantized_weight(weight, one, None, length, 0, False, torch.float32)
    if not torch.equal(kept, numbers):
        return "dequant_linear"
    nan = torch.zeros_like(scale)
    sums = weight.sum(-1, dtype=torch.int32)
    exact = gemm.reference_int_gemm(codes.cpu(), weight.cpu()).to(device, torch.int32)
    wanted = (exact - zero * sums).to(torch.float32) * scale * one.flatten() + bias
    found = int_linear(codes, weight, scale, one, zero, sums, None, bias, nan, 0, False)
    if not torch.equal(found, wanted):
        return "int_linear"
    total = torch.zeros_like(wanted)
    pairs = zip(codes.cpu().split(group, 1), weight.cpu().split(group, 1), strict=True)
    for g, (left, right) in enumerate(pairs):
        part = gemm.reference_int_gemm(left, right).to(device, torch.int32)
        total += part.to(torch.float32) * scales.select(1, g)
    given = (None, None, None, bias, nan, group, False)
    if not torch.equal(
        grouped_int_linear(codes, weight, scale, scales, *given), total * scale + bias
    ):
        return "grouped_int_linear"
    return ""
