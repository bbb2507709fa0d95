"""Each operator of a quantized graph in ONNX: a row a operator.

Codes of inputs are uint8 here, 128 above the graph's: the kernels of x86 multiply unsigned by
signed or unsigned bytes, and only two unsigned ones without saturating. Zero points of the graph's
own stay int32. Codes of 8-bit weights are 128 above the graph's too: see ``shift_of``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21 as op

from fxquant.exports.onnx_prepare import ONNX_OPS, SHIFT
from fxquant.formats.scales import MIN_SCALE
from fxquant.ir.legal_forms import OPS

FLOAT, INT32 = ir.DataType.FLOAT.value, ir.DataType.INT32.value
UINT8 = ir.DataType.UINT8.value


def _constant(value: Any, dtype: Any) -> Any:
    return op.Constant(value=ir.tensor(np.array(value, dtype)))


def _float(value: float) -> Any:
    return _constant(value, np.float32)


def quantize(x: Any, scale: Any, zero_point: Any, qmin: int, qmax: int, dtype: torch.dtype) -> Any:
    """One scale for the tensor, or one a row of the last dimension: axis 0 of the rows."""
    zero = _constant(SHIFT, np.uint8)
    if zero_point is not None:
        zero = op.Cast(op.Add(zero_point, _constant(SHIFT, np.int32)), to=UINT8)
    if len(scale.shape) == 0:
        codes = op.QuantizeLinear(x, scale, zero)
    else:
        # The columns of attention's probabilities are as many as there are tokens.
        shape = op.Concat(_constant([-1], np.int64), op.Shape(x, start=-1), axis=0)
        rows = op.Reshape(x, shape)
        scales = op.Reshape(scale, _constant([-1], np.int64))
        if zero_point is None:
            zeros = op.Expand(zero, op.Shape(scales))
        else:
            zeros = op.Reshape(zero, _constant([-1], np.int64))
        codes = op.Reshape(op.QuantizeLinear(rows, scales, zeros, axis=0), op.Shape(x))
    if (qmin, qmax) == (-SHIFT, SHIFT - 1):
        return codes
    return op.Clip(codes, _constant(SHIFT + qmin, np.uint8), _constant(SHIFT + qmax, np.uint8))


def choose_qparams(x: Any, granularity: str, symmetric: bool, qmin: int, qmax: int) -> Any:
    def over(reduce: Callable[..., Any], values: Any) -> Any:
        if granularity == "token":
            return reduce(values, _constant([-1], np.int64), keepdims=1)
        return reduce(values, keepdims=0)

    if symmetric:
        scale = _safe(op.Div(over(op.ReduceMax, op.Abs(x)), _float(qmax)))
        return scale, op.Cast(op.Mul(scale, _float(0)), to=INT32)
    low = op.Min(over(op.ReduceMin, x), _float(0))
    high = op.Max(over(op.ReduceMax, x), _float(0))
    steps = _float(qmax - qmin)
    scale = _safe(op.Sub(op.Div(high, steps), op.Div(low, steps)))
    zero = op.Round(op.Sub(_float(qmin), op.Div(low, scale)))
    return scale, op.Cast(op.Clip(zero, _float(qmin), _float(qmax)), to=INT32)


def _safe(scale: Any) -> Any:
    raised = op.Max(scale, _float(MIN_SCALE))
    return op.Where(op.Equal(scale, _float(0)), _float(1), raised)


def dequantize(codes: Any, scale: Any, zero_point: Any, group_size: int, like: Any) -> Any:
    """Rows of an embedding's codes; those of a linear are coded_linear's."""
    values = op.Cast(codes, to=FLOAT)
    shape = op.Shape(values)
    if group_size:
        apart = [0, 0, codes.shape[-1] // group_size, group_size]
        values = op.Reshape(values, _constant(apart, np.int64))
        scale = op.Unsqueeze(scale, _constant([-1], np.int64))
        if zero_point is not None:
            zero_point = op.Unsqueeze(zero_point, _constant([-1], np.int64))
    if zero_point is not None:
        values = op.Sub(values, op.Cast(zero_point, to=FLOAT))
    return op.Reshape(op.Mul(values, scale), shape)


def coded_linear(
    x: Any, codes: Any, scale: Any, zero_point: Any, bias: Any, group_size: int
) -> Any:
    """DequantizeLinear and MatMul, which ONNX Runtime makes one MatMulNBits."""
    where = {"axis": 0, "block_size": group_size} if group_size else {"axis": 1}
    operands = (codes, scale) if zero_point is None else (codes, scale, zero_point)
    y = op.MatMul(x, op.DequantizeLinear(*operands, **where))
    return y if bias is None else op.Add(y, bias)


def int_product(x_codes: Any, codes: Any, shift: int) -> Any:
    """Exact: the input's zero point is 128, the weight's ``shift``, 0 where none is said."""
    zero = _constant(SHIFT, np.uint8)
    if shift:
        return op.MatMulInteger(x_codes, codes, zero, _constant(shift, np.uint8))
    return op.MatMulInteger(x_codes, codes, zero)


def int_matmul(left_codes: Any, right_codes: Any) -> Any:
    shift = _constant(SHIFT, np.uint8)
    return op.MatMulInteger(left_codes, right_codes, shift, shift)


def column_scales(scale: Any, x: Any) -> Any:
    # A value of its own: the exporter names what a node gives, and a static scale is an input.
    return op.Identity(scale)


def code_sum(codes: Any) -> Any:
    total = op.ReduceSum(op.Cast(codes, to=INT32), _constant([-1], np.int64), keepdims=1)
    return op.Sub(total, _constant(SHIFT * codes.shape[-1], np.int32))


def rescale(
    sums: Any,
    scale: Any,
    weight_scale: Any,
    zero_point: Any,
    weight_sum: Any,
    weight_zero_point: Any,
    x_sum: Any,
    like: Any,
) -> Any:
    if zero_point is not None and weight_sum is not None:
        sums = op.Sub(sums, op.Mul(zero_point, weight_sum))
    if weight_zero_point is not None and x_sum is not None:
        sums = op.Sub(sums, op.Mul(weight_zero_point, x_sum))
    y = op.Mul(op.Cast(sums, to=FLOAT), scale)
    return y if weight_scale is None else op.Mul(y, weight_scale)


def add_bias(y: Any, bias: Any, like: Any) -> Any:
    return op.Add(y, bias)


def attention(query: Any, key: Any, value: Any, mask: Any, scale: float | None) -> Any:
    """A query that attends to no key gives 0, as in torch, whose exporter lets it attend to all."""
    width = query.shape[-1] ** -0.5 if scale is None else scale
    scores = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
    scores = op.Mul(scores, _float(width))
    if mask is None:
        length = op.Squeeze(op.Shape(query, start=2, end=3))
        places = op.Range(_constant(0, np.int64), length, _constant(1, np.int64))
        mask = op.LessOrEqual(places, op.Unsqueeze(places, _constant([-1], np.int64)))
    elif mask.dtype != ir.DataType.BOOL:
        scores = op.Add(scores, mask)
        mask = op.Not(op.Equal(scores, _float(-np.inf)))
    # A row whose keys are all masked has no softmax of its own.
    low = _float(torch.finfo(torch.float32).min)
    shares = op.Softmax(op.Where(mask, scores, low), axis=-1)
    return op.MatMul(op.Where(mask, shares, _float(0)), value)


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    OPS.quantize.default: quantize,
    OPS.choose_qparams.default: choose_qparams,
    OPS.dequantize.default: dequantize,
    OPS.int_matmul.default: int_matmul,
    OPS.attention.default: attention,
    OPS.column_scales.default: column_scales,
    OPS.code_sum.default: code_sum,
    OPS.rescale.default: rescale,
    OPS.add_bias.default: add_bias,
    ONNX_OPS.coded_linear.default: coded_linear,
    ONNX_OPS.int_product.default: int_product,
}
