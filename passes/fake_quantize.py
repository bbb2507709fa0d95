"""A linear as its quantized site would compute it, in float: what searches try out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.quantization import choose_qparams, dequantize, encode
from fxquant.specs import ActivationSpec, TensorSpec


def fake_weight(weight: Tensor, spec: TensorSpec) -> Tensor:
    """A float32 weight [N, K] rounded to nearest on its min-max grid."""
    qmin, qmax = spec.qrange
    scale, zero_point = choose_qparams(
        weight,
        qmin,
        qmax,
        symmetric=spec.symmetric,
        granularity=spec.granularity,
        group_size=spec.group_size,
    )
    codes = encode(weight, scale, zero_point, qmin, qmax, group_size=spec.group_size)
    return dequantize(codes, scale, zero_point, group_size=spec.group_size)


def fake_activation(x: Tensor, spec: ActivationSpec, static: Mapping[str, Tensor]) -> Tensor:
    """``x`` quantized and dequantized, float32; ``static`` as static_qparams gives it."""
    tensor = spec.tensor
    qmin, qmax = tensor.qrange
    if spec.dynamic:
        scale, zero_point = choose_qparams(
            x, qmin, qmax, symmetric=tensor.symmetric, granularity=tensor.granularity
        )
    else:
        scale = static["input_scale"]
        zero_point = static.get("input_zero_point", torch.zeros_like(scale, dtype=torch.int32))
    return dequantize(encode(x, scale, zero_point, qmin, qmax), scale, zero_point)
