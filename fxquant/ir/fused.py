"""The fused operators of level kernels: a site in two nodes, ``torch.ops.fxquant.*``.

Each is the composition of the plain operators that stand at level integer, and gives its very bits
(``code_linear``, of level kernels-inexact, those of a device that adds in fewer bits than exact);
where ``fxquant.numerics.kernels`` has an implementation that takes the call, that one runs. As the
plain ones they are CompositeImplicitAutograd: compilers and FakeTensor see the composition.

``nan`` [..., 1], in the dtype of the site's input and so of its result, holds 0, and NaN for each
row in which the input holds one, which has no code. ``packed``: the weight's codes are two a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxquant.formats.packing import unpack_int4
from fxquant.ir import grid_operators, operators
from fxquant.numerics import quantization
from fxquant.numerics.kernels.table import implementation


def quantize_rows(
    x: Tensor, granularity: str, symmetric: bool, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes int8, dynamic scale, zero point (0 where symmetric) and ``nan`` of ``x`` [..., K]."""
    scale, zero_point = operators.choose_qparams(x, granularity, symmetric, qmin, qmax)
    shift = None if symmetric else zero_point
    codes = operators.quantize(x, scale, shift, qmin, qmax, torch.int8)
    return codes, scale, zero_point, quantization.nan_rows(x).to(x.dtype)


def quantize_static(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """Codes int8 and ``nan`` of ``x`` [..., K] under a calibrated scale ()."""
    codes = operators.quantize(x, scale, zero_point, qmin, qmax, torch.int8)
    return codes, quantization.nan_rows(x).to(x.dtype)


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
    """[..., N] in nan's dtype: int_gemm, its corrections, rescale and add_bias.

    codes int8 [..., K]; weight int8 [N, K]; scale and zero_point () or [..., 1]; weight_scale and
    weight_zero_point () or [N, 1]; weight_sum int32 [N]; chunk as int_gemm has it.
    """
    columns = unpack_int4(weight, codes.shape[-1]) if packed else weight
    sums = operators.int_gemm(codes, columns, chunk)
    x_sum = None if weight_zero_point is None else operators.code_sum(codes)
    shift = None if weight_zero_point is None else weight_zero_point.flatten()
    y = operators.rescale(
        sums, scale, weight_scale.flatten(), zero_point, weight_sum, shift, x_sum, None
    )
    return _finished(y, bias, nan)


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
    """The same by groups of K: grouped_gemm, rescale and add_bias; weight_scale [N, G]."""
    columns = unpack_int4(weight, codes.shape[-1]) if packed else weight
    sums = operators.grouped_gemm(
        codes, columns, weight_scale, zero_point, weight_sum, weight_zero_point, group_size
    )
    y = operators.rescale(sums, scale, None, None, None, None, None, None)
    return _finished(y, bias, nan)


def dequant_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    packed: bool,
) -> Tensor:
    """``linear(x, dequantize(weight), bias)``: weights alone are codes; group_size 0: no groups."""
    columns = unpack_int4(weight, x.shape[-1]) if packed else weight
    numbers = operators.dequantize(columns, weight_scale, weight_zero_point, group_size, x)
    return torch.nn.functional.linear(x, numbers, bias)


def int_product(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, nan: Tensor
) -> Tensor:
    """[..., M, N] in nan's dtype: int_matmul and rescale of two activations' codes.

    left int8 [..., M, K], right int8 [..., K, N]; left_scale () or [..., M, 1], right_scale () or
    [..., 1, N]; nan [..., M, 1] is the left's.
    """
    sums = operators.int_matmul(left, right)
    y = operators.rescale(sums, left_scale, right_scale, None, None, None, None, None)
    return _finished(y, None, nan)


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
    """[..., N] in like's dtype: code_gemm, rescale and add_bias, without zero points.

    codes [..., K] and weight [N, K] as they are stored; scale () or [..., 1], weight_scale () or
    [N, 1]; ``like`` [..., K] is what the codes are of.
    """
    sums = grid_operators.code_gemm(codes, weight, None, None, x_grid, weight_grid)
    last = like if bias is None else None
    y = operators.rescale(sums, scale, weight_scale.flatten(), None, None, None, None, last)
    return y if bias is None else operators.add_bias(y, bias, like)


def _finished(y: Tensor, bias: Tensor | None, nan: Tensor) -> Tensor:
    """What add_bias does, or rescale where there is none."""
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.add_(nan).to(nan.dtype)


_SITE = (
    "Tensor codes, Tensor weight, Tensor scale, Tensor weight_scale, Tensor? zero_point, "
    "Tensor? weight_sum, Tensor? weight_zero_point, Tensor? bias, Tensor nan"
)
COMPOSED: dict[str, Callable[..., Any]] = {
    "quantize_rows(Tensor x, str granularity, bool symmetric, int qmin, int qmax)"
    " -> (Tensor, Tensor, Tensor, Tensor)": quantize_rows,
    "quantize_static(Tensor x, Tensor scale, Tensor? zero_point, int qmin, int qmax)"
    " -> (Tensor, Tensor)": quantize_static,
    f"int_linear({_SITE}, int chunk, bool packed) -> Tensor": int_linear,
    f"grouped_int_linear({_SITE}, int group_size, bool packed) -> Tensor": grouped_int_linear,
    "int_product(Tensor left, Tensor right, Tensor left_scale, Tensor right_scale, Tensor nan)"
    " -> Tensor": int_product,
    "dequant_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point,"
    " Tensor? bias, int group_size, bool packed) -> Tensor": dequant_linear,
    "code_linear(Tensor codes, Tensor weight, Tensor scale, Tensor weight_scale, Tensor? bias,"
    " Tensor like, str x_grid, str weight_grid) -> Tensor": code_linear,
}
_LIBRARY = torch.library.Library("fxquant", "FRAGMENT")


def _fastest(name: str, composition: Callable[..., Any]) -> Callable[..., Any]:
    def run(*operands: Any) -> Any:
        found = implementation(name, *operands)
        return (composition if found is None else found.run)(*operands)

    return run


for _schema, _function in COMPOSED.items():
    _LIBRARY.define(_schema)
    _name = _schema.split("(")[0]
    _LIBRARY.impl(_name, _fastest(_name, _function), "CompositeImplicitAutograd")
