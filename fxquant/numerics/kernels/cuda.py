"""Fused operators on CUDA by Triton, an optional library: when it takes a call, and its first test.

Triton compiles for the device at hand and its versions differ, so each kind of kernel (by dtype, by
what it is given and by its sizes) is asked once a process before its first call is Triton's: see
first_test.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxquant.numerics.kernels.first_test import Kind, differs
from fxquant.numerics.kernels.tiles import multiple, row_block, tile, turned, weight_block

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST = 2**31  # elements, that a kernel counts in int32
_MOST = 2**16 - 1  # programs along a grid's second dimension
_NEEDS = (8, 0)  # compute capability: int8 tensor cores as Triton knows them


def without_rows(x: Tensor, granularity: str, symmetric: bool, qmin: int, qmax: int) -> str:
    """Why Triton does not make the codes of ``x`` under a range of its own."""
    token = granularity == "token"
    kind = Kind("quantize_rows", x.dtype, token, shifted=not symmetric, ends=(qmin, qmax))
    kind = _of_rows(kind, x.shape[-1], row_block)
    return ("" if x.numel() else "nothing to compute") or _without(x, kind)


def without_static(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> str:
    """The same under a calibrated range."""
    shifted = zero_point is not None
    kind = Kind("quantize_static", x.dtype, shifted=shifted, ends=(qmin, qmax))
    kind = _of_rows(kind, x.shape[-1], row_block)
    found = _without_dtypes((scale,), (zero_point,))
    return ("" if x.numel() else "nothing to compute") or found or _without(x, kind)


def without_gemm(codes: Tensor, weight: Tensor, *rest: Any) -> str:
    """Why Triton does not multiply; operands as int_linear's."""
    return _without_multiply("int_linear", codes, weight, *rest)


def without_groups(codes: Tensor, weight: Tensor, *rest: Any) -> str:
    """The same for grouped_int_linear, whose groups begin at a whole byte."""
    group_size, packed = rest[-2:]
    if packed and group_size % 2:
        return f"groups of {group_size} codes begin in the middle of a byte"
    return _without_multiply("grouped_int_linear", codes, weight, *rest)


def without_dequantize(x: Tensor, weight: Tensor, weight_scale: Tensor, *rest: Any) -> str:
    """Why Triton does not make the weight's numbers; operands as dequant_linear's."""
    if weight_scale.dim() == 0:
        return "one scale for the whole weight"
    shift, _, group_size, packed = rest
    shifted = shift is not None
    kind = Kind("dequant_linear", x.dtype, packed=packed, weight_shifted=shifted)
    kind = replace(kind, group=multiple(group_size or x.shape[-1]))
    found = _without_dtypes((weight_scale,), (shift,))
    return found or _without(x, _of_rows(kind, x.shape[-1], weight_block))


def without_product(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, nan: Tensor
) -> str:
    """Why Triton does not multiply two activations; operands as int_product's."""
    batches = left.shape[:-2]
    if right.shape[:-2] != batches:
        return f"matrices {list(batches)} by {list(right.shape[:-2])}"
    sizes = (left_scale.numel(), right_scale.numel(), nan.numel())
    rows, columns = left.numel() // max(1, left.shape[-1]), batches.numel() * right.shape[-1]
    if sizes[0] not in (1, rows) or sizes[1] not in (1, columns) or sizes[2] != rows:
        return "scales that are neither one for all nor one for each token"
    if batches.numel() > _MOST:
        return f"{batches.numel()} matrices"
    if max(rows * right.shape[-1], left.numel(), right.numel()) >= _LARGEST:
        return f"{rows * right.shape[-1]} sums or more"
    tall, deep = tile(*left.shape[-2:])
    kind = Kind("int_product", nan.dtype, rows=tall, depth=deep, turned=turned(right))
    found = _without_dtypes((left_scale, right_scale), ())
    return found or _without(left, _sized(kind, left.shape[-1], right.shape[-1]))


def _of_rows(kind: Kind, length: int, block: Callable[[int], int]) -> Kind:
    return replace(kind, block=block(length), length=multiple(length))


def _sized(kind: Kind, length: int, columns: int) -> Kind:
    return replace(kind, length=multiple(length), columns=multiple(columns))


def _product_kind(operator: str, codes: Tensor, weight: Tensor, *rest: Any) -> Kind:
    _, _, zero_point, _, shift, bias, nan, size, packed = rest
    length = codes.shape[-1]
    rows = codes.numel() // max(1, length)
    # int_linear's ``size`` is a chunk of fp32 sums, which is nothing to Triton.
    tall, deep = tile(rows, size if operator == "grouped_int_linear" else length)
    kind = Kind(
        operator,
        nan.dtype,
        packed=packed,
        shifted=zero_point is not None,
        weight_shifted=shift is not None,
        bias=None if bias is None else bias.dtype,
        rows=tall,
        depth=deep,
        group=multiple(size) if operator == "grouped_int_linear" else 16,
    )
    return _sized(kind, length, weight.shape[0])


def _without_multiply(operator: str, codes: Tensor, weight: Tensor, *rest: Any) -> str:
    scale, weight_scale, zero_point, weight_sum, shift, *_ = rest
    found = _without_dtypes((scale, weight_scale), (zero_point, weight_sum, shift))
    kind = _product_kind(operator, codes, weight, *rest)
    return found or _too_large(codes, weight) or _without(codes, kind)


def _without_dtypes(scales: tuple[Tensor, ...], whole: tuple[Tensor | None, ...]) -> str:
    """Scales are float32 and whole numbers int32: others would be compiled apart."""
    for wanted, tensors in ((torch.float32, scales), (torch.int32, whole)):
        for each in tensors:
            if each is not None and each.dtype != wanted:
                return f"{each.dtype} where {wanted} is usual"
    return ""


def _too_large(left: Tensor, right: Tensor) -> str:
    sums = (left.numel() // max(1, left.shape[-1])) * right.shape[0]
    return f"{sums} sums or more" if max(sums, left.numel(), right.numel()) >= _LARGEST else ""


def _without(x: Tensor, kind: Kind) -> str:
    if kind.dtype not in _DTYPES:
        return f"no kernel for {kind.dtype}"
    return missing_library() or _without_device(x.device) or _inexact(kind, x.device)


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
    return ""


@functools.cache
def _inexact(kind: Kind, device: torch.device) -> str:
    """Why calls of this kind are not Triton's: it does not run there, or not to the same bits."""
    try:
        with torch.cuda.device(device):  # Triton launches on the current device
            wrong = differs(kind, device)
    except Exception as error:  # no C compiler, a version that cannot: the composition runs
        reason = f"Triton does not run here: {type(error).__name__}: {error}"
        _warn(reason)
        return reason
    if wrong:
        _warn(
            f"Triton's {kind.operator} gives other bits on {torch.cuda.get_device_name(device)} "
            f"than PyTorch's operators ({kind})"
        )
    return f"its {kind.operator} is not exact here" if wrong else ""


def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}; level kernels runs PyTorch's operators instead, slower and exact",
        RuntimeWarning,
        stacklevel=3,
    )


def quantize_rows(*operands: Any) -> Any:
    from fxquant.numerics.kernels import triton_quantize

    with torch.cuda.device_of(operands[0]):  # Triton launches on the current device
        return triton_quantize.quantize_rows(*operands)


def quantize_static(*operands: Any) -> Any:
    from fxquant.numerics.kernels import triton_quantize

    with torch.cuda.device_of(operands[0]):  # Triton launches on the current device
        return triton_quantize.quantize_static(*operands)


def int_linear(*operands: Any) -> Any:
    from fxquant.numerics.kernels import triton_gemm

    with torch.cuda.device_of(operands[0]):  # Triton launches on the current device
        return triton_gemm.int_linear(*operands)


def int_product(*operands: Any) -> Any:
    from fxquant.numerics.kernels import triton_gemm

    with torch.cuda.device_of(operands[0]):  # Triton launches on the current device
        return triton_gemm.int_product(*operands)


def grouped_int_linear(*operands: Any) -> Any:
    from fxquant.numerics.kernels import triton_gemm

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
    from fxquant.numerics.kernels import triton_gemm

    with torch.cuda.device_of(x):
        numbers = triton_gemm.dequantized_weight(
            weight, weight_scale, weight_zero_point, x.shape[-1], group_size, packed, x.dtype
        )
    return torch.nn.functional.linear(x, numbers, bias)
