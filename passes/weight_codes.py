"""Integer codes of one weight, and the search for scales that suits second-order rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxquant.errors import SchemeError
from fxquant.operators import pack_int4
from fxquant.quantization import (
    activation_qparams_from_range,
    calc_qparams_symmetric,
    dequantize,
    encode,
    group_count,
)
from fxquant.specs import TensorSpec

# Shares of the min-max range that are tried. Below 0.4 even 3-bit codes clip too much.
SHRINKS = tuple(1 - 0.04 * step for step in range(16))
_CHUNK_ELEMENTS = 2**18  # a chunk of rows and its temporaries stay in the cache


@dataclass(frozen=True)
class WeightCodes:
    """A weight [N, K] as codes.

    ``codes`` int8 [N, K], ``scales`` float32 and ``zero_points`` int32 (0 if symmetric), both ()
    per tensor, [N, 1] per channel, [N, G] per group. ``damping`` is what the Hessian's diagonal
    was raised by, as a share of its mean; 0 where no factorization was needed. ``note``: what
    there is to say about them.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    spec: TensorSpec
    damping: float = 0.0
    note: str = ""

    def dequantize(self) -> Tensor:
        """``(codes - zero_points) * scales``, float32 [N, K]."""
        return dequantize(
            self.codes, self.scales, self.zero_points, group_size=self.spec.group_size
        )

    def rows(self, which: slice) -> WeightCodes:
        """Those of some rows; a grid per tensor stays whole."""
        whole = self.scales.dim() == 0
        return replace(
            self,
            codes=self.codes[which],
            scales=self.scales if whole else self.scales[which],
            zero_points=self.zero_points if whole else self.zero_points[which],
        )

    def tensors(self) -> dict[str, Tensor]:
        """The buffers that a quantized site holds: codes packed up to 4 bits, scale, zero point."""
        packed = pack_int4(self.codes) if self.spec.bits <= 4 else self.codes
        found = {"weight": packed, "weight_scale": self.scales}
        if not self.spec.symmetric:
            found["weight_zero_point"] = self.zero_points
        return found


def round_to_nearest(
    weight: Tensor, spec: TensorSpec, scales: Tensor, zero_points: Tensor
) -> WeightCodes:
    """The nearest codes of ``weight`` [N, K] on the given grid."""
    qmin, qmax = spec.qrange
    codes = encode(weight, scales, zero_points, qmin, qmax, torch.int8, spec.group_size)
    return WeightCodes(codes, scales, zero_points, spec)


def search_scales(weight: Tensor, spec: TensorSpec, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points that minimize ``sum_k importance_k (w_k - Q(w)_k)^2``.

    weight float [N, K]; importance float [K], not negative. The min-max range of each row (or
    group, or the tensor) is shrunk evenly by SHRINKS; ties keep the wider range. Returns float32
    and int32 of the shape that ``spec`` asks for.
    """
    if spec.granularity == "token":
        raise SchemeError("a weight is per tensor, channel or group, not per token")
    rows, columns = weight.shape
    size = columns if spec.group_size is None else min(spec.group_size, columns)
    groups = group_count(columns, size)
    padding = groups * size - columns
    weights = torch.nn.functional.pad(weight.to(torch.float32), (0, padding))
    factors = torch.nn.functional.pad(importance.to(torch.float32), (0, padding))
    # Only ratios count; extreme ones would lose the small terms in fp32.
    factors = (factors / factors.max().clamp(min=torch.finfo(torch.float32).tiny)).view(-1, size)
    if spec.granularity == "tensor":
        factors = factors.expand(rows, -1).reshape(1, 1, -1)
        scale, zero_point = _search(weights.reshape(1, 1, -1), factors, spec)
        return scale.view(()), zero_point.view(())
    step = max(1, _CHUNK_ELEMENTS // max(1, columns))
    chunks = weights.view(rows, groups, size).split(step)
    found = [_search(chunk, factors, spec) for chunk in chunks]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _search(weights: Tensor, factors: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Best scale and zero point [n, G] of weights [n, G, g] under factors [G, g]."""
    low, high = weights.amin(-1), weights.amax(-1)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shrink in SHRINKS:
        scale, zero_point = range_qparams(low * shrink, high * shrink, spec)
        error = _weighted_error(weights, factors, scale, zero_point, spec)
        if best is None:
            best = error, scale, zero_point
        else:
            better = error < best[0]
            new = (error, scale, zero_point)
            best = tuple(torch.where(better, a, b) for a, b in zip(new, best, strict=True))  # type: ignore[assignment]
    assert best is not None
    return best[1], best[2]


def range_qparams(low: Tensor, high: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each range [low, high] of a weight, in the ranges' shape."""
    qmin, qmax = spec.qrange
    if spec.symmetric:
        scale = calc_qparams_symmetric(torch.maximum(-low, high), qmax, ())
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    return activation_qparams_from_range(low, high, qmin, qmax)


def _weighted_error(
    weights: Tensor, factors: Tensor, scale: Tensor, zero_point: Tensor, spec: TensorSpec
) -> Tensor:
    qmin, qmax = spec.qrange
    steps = weights / scale[..., None]
    rounded = steps.round()
    if spec.symmetric:
        rounded.clamp_(qmin, qmax)
    else:
        rounded.clamp_(qmin - zero_point[..., None], qmax - zero_point[..., None])
    distance = rounded.sub_(steps).square_()
    return distance.mul_(factors).sum(-1).mul_(scale.square())
