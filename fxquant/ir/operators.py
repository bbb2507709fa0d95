"""The operators that stand in quantized graphs: ``torch.ops.fxquant.*``.

All but ``int_gemm_cuda``, ``int_matmul_cpu`` and ``causal_attention_cpu``, which no graph names,
are CompositeImplicitAutograd: one node in an fx graph, yet torch.compile and FakeTensor see through
them. None returns or aliases an input. ``like`` operands give the result's dtype, so that a
converted model follows ``.half()`` and ``.to()``; where they are the site's input, a NaN in a row
of it, which has no code, makes that row of the result NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxquant.formats.integer import integer
from fxquant.formats.packing import unpack_int4
from fxquant.ir import grid_operators
from fxquant.numerics import cpu_int8, gemm, quantization
from fxquant.numerics.kernels import cpu_attention

_LIBRARY = torch.library.Library("fxquant", "DEF")


def choose_qparams(
    x: Tensor, granularity: str, symmetric: bool, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """Dynamic scale (fp32) and zero point (int32): () for "tensor", [..., 1] for "token"."""
    return quantization.choose_qparams(x, qmin, qmax, symmetric=symmetric, granularity=granularity)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, dtype: torch.dtype
) -> Tensor:
    """Codes of ``x``, granularity by the scale's shape."""
    return quantization.encode(x, scale, zero_point, qmin, qmax, dtype)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, like: Tensor
) -> Tensor:
    """``(codes - zero_point) * scale`` in fp32, cast to like's dtype; group_size 0: no groups.

    Rows of codes of ``like`` itself, under one scale, are NaN where its are.
    """
    values = quantization.dequantize(codes, scale, zero_point, group_size=group_size or None)
    if scale.dim() == 0 and codes.dim() > 1 and codes.shape == like.shape:
        values = _with_nan_of(values, like)
    return values.to(like.dtype)


def int_gemm(x_codes: Tensor, weight_codes: Tensor, chunk: int) -> Tensor:
    """int32 [..., N] of int8 [..., K] by [N, K], exact: see fxquant.numerics.gemm."""
    rows = x_codes.reshape(-1, x_codes.shape[-1])
    if x_codes.device.type == "cuda":
        sums = torch.ops.fxquant.int_gemm_cuda(rows, weight_codes, chunk)
    elif _cpu_int8(rows):
        sums = cpu_int8.int_mm(rows, weight_codes)
    else:
        sums = gemm.float_int_gemm(rows, weight_codes, chunk)
    result: Tensor = sums.view(*x_codes.shape[:-1], weight_codes.shape[0])
    return result


def int_matmul(left_codes: Tensor, right_codes: Tensor) -> Tensor:
    """int32 [..., M, N] of int8 [..., M, K] by [..., K, N], both activations, exact."""
    if _cpu_int8(left_codes):
        sums: Tensor = torch.ops.fxquant.int_matmul_cpu(left_codes, right_codes)
        return sums
    return gemm.batched_int_matmul(left_codes, right_codes)


def _cpu_int8(codes: Tensor) -> bool:
    """Whether the processor's int8 instructions take them; asked when a graph runs or compiles. A
    program that is exported goes to other processors."""
    here = codes.device.type == "cpu" and not torch.compiler.is_exporting()
    return here and cpu_int8.exact_int_mm()


def column_scales(scale: Tensor, x: Tensor) -> Tensor:
    """fp32 [..., 1, N]: the static scale () of a product's right operand ``x`` [..., K, N], NaN for
    each column that holds one, which has no code."""
    return scale + quantization.nan_rows(x.transpose(-2, -1)).transpose(-2, -1)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """softmax(query key^T * scale) value of [batch, heads, length, width]; scale None: width^-1/2.

    mask [batch or 1, heads or 1, length, length]: True where a query attends, or float scores to
    add; None: causal, by a kernel that needs no mask.
    """
    if mask is None and _own_attention(query, key, value):
        out: Tensor = torch.ops.fxquant.causal_attention_cpu(query, key, value, scale)
        return out
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
    )


def _own_attention(*operands: Tensor) -> bool:
    """Whether ours takes a causal call: it has no derivative, other engines do not know it, and
    autocast, which makes operands of one dtype for torch's, does not know it either."""
    wanted = torch.is_grad_enabled() and any(each.requires_grad for each in operands)
    elsewhere = torch.compiler.is_exporting() or torch.is_autocast_enabled("cpu")
    return operands[0].device.type == "cpu" and not (wanted or elsewhere)


def store_kv(x: Tensor, bits: int) -> Tensor:
    """``x`` [batch, heads, tokens, width] as a cache of ``bits`` bits would give it back.

    Affine codes per token and head (its last dimension), in x's dtype. Its gradient is x's own.
    """
    qmin, qmax = integer(bits, symmetric=False).codes
    scale, zero_point = quantization.choose_qparams(
        x, qmin, qmax, symmetric=False, granularity="token"
    )
    codes = quantization.encode(x, scale, zero_point, qmin, qmax)
    stored = quantization.dequantize(codes, scale, zero_point, dtype=x.dtype)
    return quantization.straight_through(x, stored)


def code_sum(codes: Tensor) -> Tensor:
    """int32 sums over the last dimension, kept with size 1."""
    return codes.sum(dim=-1, keepdim=True, dtype=torch.int32)


def grouped_gemm(
    x_codes: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    weight_sum: Tensor | None,
    weight_zero_point: Tensor | None,
    group_size: int,
) -> Tensor:
    """fp32 [..., N]: int32 sums for each group of K, rescaled by the group's weight scale.

    weight_scale and weight_zero_point [N, G]; weight_sum int32 [N, G] holds each group's sum of
    (w_q - weight_zero_point) and goes with zero_point, the activation's.
    """
    total: Tensor | None = None
    columns = zip(x_codes.split(group_size, -1), weight_codes.split(group_size, -1), strict=True)
    for g, (xs, ws) in enumerate(columns):
        sums = int_gemm(xs, ws, 0 if ws.shape[-1] <= gemm.CHUNK else gemm.CHUNK)
        sums = _correct(
            sums,
            zero_point,
            None if weight_sum is None else weight_sum.select(1, g),
            None if weight_zero_point is None else weight_zero_point.select(1, g),
            None if weight_zero_point is None else code_sum(xs),
        )
        part = sums.to(torch.float32) * weight_scale.select(1, g)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _correct(
    sums: Tensor,
    zero_point: Tensor | None,
    weight_sum: Tensor | None,
    weight_zero_point: Tensor | None,
    x_sum: Tensor | None,
) -> Tensor:
    """sum (x_q - z_x)(w_q - z_w) = sum x_q w_q - z_x sum (w_q - z_w) - z_w sum x_q, in int32."""
    if zero_point is not None and weight_sum is not None:
        sums = sums - zero_point * weight_sum
    if weight_zero_point is not None and x_sum is not None:
        sums = sums - weight_zero_point * x_sum
    return sums


def _with_nan_of(y: Tensor, x: Tensor) -> Tensor:
    """``y`` [..., N], a fresh tensor, with NaN in the rows in which ``x`` [..., K] holds one."""
    if x.dim() != y.dim() or x.shape[:-1] != y.shape[:-1] or x.shape[-1] == 0:
        return y  # not the site's input: it only gives the dtype
    return y.add_(quantization.nan_rows(x))


def rescale(
    sums: Tensor,
    scale: Tensor | None,
    weight_scale: Tensor | None,
    zero_point: Tensor | None,
    weight_sum: Tensor | None,
    weight_zero_point: Tensor | None,
    x_sum: Tensor | None,
    like: Tensor | None,
) -> Tensor:
    """fp32 ``corrected sums * scale * weight_scale``, cast to like's dtype where given.

    sums int32 [..., N], of code_gemm float; scale () or [..., 1], weight_scale () or [N], each None
    where the sums of a grouped GEMM carry it already; weight_sum and weight_zero_point int32 () or
    [N]; x_sum int32 [..., 1].
    """
    corrected = _correct(sums, zero_point, weight_sum, weight_zero_point, x_sum)
    # A conversion is a fresh tensor to write in; sums that are fp32 already are not ours.
    converted = corrected.dtype != torch.float32
    y = corrected.to(torch.float32) if converted else corrected.clone()
    if scale is not None:
        y = y.mul_(scale)
    if weight_scale is not None:
        y = y.mul_(weight_scale)
    return y if like is None else _with_nan_of(y, like).to(like.dtype)


def add_bias(y: Tensor, bias: Tensor, like: Tensor) -> Tensor:
    """``y + bias`` in fp32, NaN in rows where ``like`` is, then one cast to like's dtype."""
    return _with_nan_of(y + bias.to(torch.float32), like).to(like.dtype)


_COMPOSITE: dict[str, Callable[..., Any]] = {
    "choose_qparams(Tensor x, str granularity, bool symmetric, int qmin, int qmax)"
    " -> (Tensor, Tensor)": choose_qparams,
    "quantize(Tensor x, Tensor scale, Tensor? zero_point, int qmin, int qmax, ScalarType dtype)"
    " -> Tensor": quantize,
    "dequantize(Tensor codes, Tensor scale, Tensor? zero_point, int group_size, Tensor like)"
    " -> Tensor": dequantize,
    "unpack_int4(Tensor packed, int length) -> Tensor": unpack_int4,
    "int_gemm(Tensor x_codes, Tensor weight_codes, int chunk) -> Tensor": int_gemm,
    "int_matmul(Tensor left_codes, Tensor right_codes) -> Tensor": int_matmul,
    "column_scales(Tensor scale, Tensor x) -> Tensor": column_scales,
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float? scale)"
    " -> Tensor": attention,
    "store_kv(Tensor x, int bits) -> Tensor": store_kv,
    "code_sum(Tensor codes) -> Tensor": code_sum,
    "grouped_gemm(Tensor x_codes, Tensor weight_codes, Tensor weight_scale, Tensor? zero_point,"
    " Tensor? weight_sum, Tensor? weight_zero_point, int group_size) -> Tensor": grouped_gemm,
    "rescale(Tensor sums, Tensor? scale, Tensor? weight_scale, Tensor? zero_point,"
    " Tensor? weight_sum, Tensor? weight_zero_point, Tensor? x_sum, Tensor? like)"
    " -> Tensor": rescale,
    "add_bias(Tensor y, Tensor bias, Tensor like) -> Tensor": add_bias,
    **grid_operators.COMPOSITE,
}

# What each operator of a graph is, by its name without "fxquant::".
WRITTEN_OUT: dict[str, Callable[..., Any]] = {
    schema.split("(")[0]: function for schema, function in _COMPOSITE.items()
}

for _schema, _function in _COMPOSITE.items():
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_schema.split("(")[0], _function, "CompositeImplicitAutograd")

# Opaque: a loop over the batch, whose size a compiler keeps symbolic.
_LIBRARY.define("int_matmul_cpu(Tensor left_codes, Tensor right_codes) -> Tensor")
_LIBRARY.impl("int_matmul_cpu", cpu_int8.batched_int_mm, "CPU")


def _fake_int_matmul_cpu(left_codes: Tensor, right_codes: Tensor) -> Tensor:
    return torch.matmul(left_codes, right_codes).to(torch.int32)


torch.library.register_fake("fxquant::int_matmul_cpu", _fake_int_matmul_cpu, lib=_LIBRARY)

# Opaque: a loop over the length.
_LIBRARY.define(
    "causal_attention_cpu(Tensor query, Tensor key, Tensor value, float? scale) -> Tensor"
)
_LIBRARY.impl("causal_attention_cpu", cpu_attention.causal_attention, "CPU")


def _fake_causal_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)


torch.library.register_fake(
    "fxquant::causal_attention_cpu", _fake_causal_attention_cpu, lib=_LIBRARY
)

# Opaque: cuBLASLt's limits and the TF32 switch are questions for run time.
_LIBRARY.define("int_gemm_cuda(Tensor x_codes, Tensor weight_codes, int chunk) -> Tensor")
_LIBRARY.impl("int_gemm_cuda", gemm.cuda_int_gemm, "CUDA")


def _fake_int_gemm_cuda(x_codes: Tensor, weight_codes: Tensor, chunk: int) -> Tensor:
    torch._check(
        x_codes.dtype == weight_codes.dtype == torch.int8
        and x_codes.shape[1] == weight_codes.shape[1],
        lambda: (
            f"int8 [M, K] and [N, K] expected, got {x_codes.dtype} {list(x_codes.shape)} and "
            f"{weight_codes.dtype} {list(weight_codes.shape)}"
        ),
    )
    torch._check(
        x_codes.device == weight_codes.device,
        lambda: f"found at least two devices: {x_codes.device} and {weight_codes.device}",
    )
    return x_codes.new_empty((x_codes.shape[0], weight_codes.shape[0]), dtype=torch.int32)


torch.library.register_fake("fxquant::int_gemm_cuda", _fake_int_gemm_cuda, lib=_LIBRARY)
