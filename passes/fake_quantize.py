"""A linear as its quantized site would compute it, in float: what searches try out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

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
    if spec.group_size is None:
        return _on_grid(weight, scale, zero_point, qmin, qmax)
    # Broadcast over groups rather than spread per column: searches do this again and again.
    length, groups = weight.shape[-1], scale.shape[-1]
    size = min(spec.group_size, length)
    grouped = nn.functional.pad(weight, (0, groups * size - length)).unflatten(-1, (groups, size))
    rounded = _on_grid(grouped, scale[..., None], zero_point[..., None], qmin, qmax)
    return rounded.flatten(-2).narrow(-1, 0, length)


def _on_grid(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """What encode and dequantize give, bit for bit; codes are small integers, exact in float32."""
    shift = zero_point.to(torch.float32)
    codes = (x / scale).round_().add_(shift).clamp_(qmin, qmax)
    return codes.sub_(shift).mul_(scale)


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
