"""WeightCodes: a weight as codes, however they were chosen; and the search for their scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxquant.errors import SchemeError
from fxquant.formats.grid import Grid
from fxquant.formats.scales import FP16, FP32
from fxquant.numerics.quantization import check_finite, expand_groups, split_groups
from fxquant.numerics.quantizer import Quantizer, global_scale_of, range_qparams
from fxquant.schemes.specs import TensorSpec

# Shares of the min-max range that are tried. Below 0.4 even 3-bit codes clip too much.
SHRINKS = tuple(1 - 0.04 * step for step in range(16))
# Scales that are rounded themselves: the next above may serve a group better than the nearest.
WIDENED = (1.25, 1.5, 2.0)
GLOBAL_SCALE = "weight_global_scale"
_CHUNK_ELEMENTS = 2**18  # a chunk of rows and its temporaries stay in the cache


@dataclass(frozen=True)
class WeightCodes:
    """A weight [N, K] as codes.

    ``codes`` [N, K] of the grid's storage dtype, ``scales`` float32 and ``zero_points`` int32 (None
    where the grid has none), both () per tensor, [N, 1] per channel, [N, G] per group. Scales lie
    where the spec's format can store them; ``global_scale`` float32, () or [N, 1], is what they
    share where it has two levels. ``damping`` is what the Hessian's diagonal was raised by, as a
    share of its mean; 0 where no factorization was needed. ``note``: what there is to say.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    spec: TensorSpec
    damping: float = 0.0
    note: str = ""
    global_scale: Tensor | None = None

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], spec: TensorSpec, length: int) -> WeightCodes:
        """The inverse of ``tensors``; ``length`` is K."""
        codes, shared = spec.grid.unpack(tensors["weight"], length), tensors.get(GLOBAL_SCALE)
        scales = spec.scale.decode(tensors["weight_scale"], shared)
        zeros = tensors.get("weight_zero_point")
        return cls(codes, scales, zeros, spec, global_scale=shared)

    def tensors(self) -> dict[str, Tensor]:
        """The buffers that a quantized site holds: codes packed up to 4 bits, scale, zero point."""
        scales = self.spec.scale.encode(self.scales, self.global_scale)
        found = {"weight": self.spec.grid.pack(self.codes), "weight_scale": scales}
        if self.zero_points is not None:
            found["weight_zero_point"] = self.zero_points
        if self.global_scale is not None:  # of one site: all rows have the same
            found[GLOBAL_SCALE] = self.global_scale.reshape(-1)[0].clone()
        return found

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``(codes - zero_points) * scales`` [N, K], computed in float32."""
        length, size = self.codes.shape[-1], self.spec.group_size
        values = self.spec.grid.decode(self.codes)
        if self.zero_points is not None:
            values = values - expand_groups(self.zero_points, length, size)
        return (values * expand_groups(self.scales, length, size)).to(dtype)

    def sqnr(self, weight: Tensor) -> float:
        """Signal to noise ratio in dB against ``weight``, of norms in float32 or wider."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        noise = float(torch.linalg.vector_norm(self.dequantize().sub_(weight)))
        signal = float(torch.linalg.vector_norm(weight, dtype=wide))
        if noise == 0:
            return math.inf
        return 20 * math.log10(signal / noise) if signal else -math.inf

    def rows(self, which: slice) -> WeightCodes:
        """Those of some rows; a grid per tensor stays whole."""
        if self.scales.dim() == 0:
            return replace(self, codes=self.codes[which])
        zeros = None if self.zero_points is None else self.zero_points[which]
        shared = self.global_scale
        return replace(
            self,
            codes=self.codes[which],
            scales=self.scales[which],
            zero_points=zeros,
            global_scale=shared if shared is None or not shared.dim() else shared[which],
        )


def stacked(parts: tuple[WeightCodes, ...]) -> WeightCodes:
    """Codes of weights that stand one below the other, all of one spec."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    shared = [
        part.global_scale.expand(len(part.codes), 1)
        for part in parts
        if part.global_scale is not None
    ]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zero_points=torch.cat(zeros) if zeros else None,
        global_scale=torch.cat(shared) if shared else None,
    )


def round_to_nearest(
    weight: Tensor, spec: TensorSpec, scales: Tensor, zero_points: Tensor | None
) -> WeightCodes:
    """The nearest codes of ``weight`` [N, K] under scales that were chosen for it."""
    codes = Quantizer(spec).codes(weight, scales, zero_points)
    shared = global_scale_of(weight, spec)
    return WeightCodes(codes, scales, zero_points, spec, global_scale=shared)


def min_max_codes(weight: Tensor, spec: TensorSpec, site: str) -> WeightCodes:
    """The nearest codes of ``weight`` [N, K] under the scales of its extremes.

    Raises NonFiniteError naming the site.
    """
    check_finite(weight, "its weight", site)
    return round_to_nearest(weight, spec, *Quantizer(spec).qparams(weight))


def searched_codes(weight: Tensor, spec: TensorSpec, importance: Tensor) -> WeightCodes:
    """The nearest codes of ``weight`` [N, K] under the scales of ``search_scales``."""
    return round_to_nearest(weight, spec, *search_scales(weight, spec, importance))


def search_scales(
    weight: Tensor, spec: TensorSpec, importance: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points that minimize ``sum_k importance_k (w_k - Q(w)_k)^2``.

    weight float [N, K]; importance float [K], not negative. The min-max range of each row (or
    group, or the tensor) is shrunk evenly by SHRINKS; ties keep the wider range, and scales that
    the spec rounds are tried with WIDENED ranges too. Returns float32
    and int32 (None where the grid has none) of the shape that ``spec`` asks for.
    """
    if spec.granularity == "token":
        raise SchemeError("a weight is per tensor, channel or group, not per token")
    weights = split_groups(weight.to(torch.float32), spec.group_size)
    factors = split_groups(importance.to(torch.float32), spec.group_size)
    # Only ratios count; extreme ones would lose the small terms in fp32.
    factors = factors / factors.max().clamp(min=torch.finfo(torch.float32).tiny)
    if spec.granularity == "tensor":
        factors = factors.expand(len(weight), -1).reshape(1, 1, -1)
        scale, zero_point = _search(weights.reshape(1, 1, -1), factors, spec)
        return scale.view(()), None if zero_point is None else zero_point.view(())
    step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    shared = global_scale_of(weight, spec)
    found = [_search(chunk, factors, spec, shared) for chunk in weights.split(step)]
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None


def _search(
    weights: Tensor, factors: Tensor, spec: TensorSpec, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Best scale and zero point [n, G] of weights [n, G, g] under factors [G, g]."""
    low, high = weights.amin(-1), weights.amax(-1)
    shares = SHRINKS if spec.scale in (FP16, FP32) else (*SHRINKS, *WIDENED)
    grids = (
        range_qparams(low * share, high * share, spec.grid, spec.scale, global_scale)
        for share in shares
    )
    return least_error(grids, lambda s, z: _weighted_error(weights, factors, s, z, spec.grid))


def least_error(
    grids: Iterable[tuple[Tensor, Tensor | None]], error: Callable[[Tensor, Tensor | None], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Of several scales and zero points of one shape, at each place those that make the least
    ``error`` (of the same shape); of equal ones the first."""
    candidates = iter(grids)
    scale, zero_point = next(candidates)
    least = error(scale, zero_point)
    for s, z in candidates:
        found = error(s, z)
        better = found < least
        least, scale = torch.where(better, found, least), torch.where(better, s, scale)
        if zero_point is not None and z is not None:
            zero_point = torch.where(better, z, zero_point)
    return scale, zero_point


def _weighted_error(
    weights: Tensor, factors: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid
) -> Tensor:
    steps = weights / scale[..., None]
    shift = None if zero_point is None else zero_point[..., None]
    distance = grid.nearest_(steps.clone(), shift).sub_(steps).square_()
    return distance.mul_(factors).sum(-1).mul_(scale.square())
