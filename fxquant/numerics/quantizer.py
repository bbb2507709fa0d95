"""Quantizer: one tensor's way to the numbers of its grid and back, as the graph computes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxquant.formats.grid import Grid
from fxquant.formats.integer import IntegerGrid
from fxquant.formats.scales import FP32, HalfScale, ScaleFormat
from fxquant.numerics.quantization import (
    activation_qparams_from_range,
    choose_qparams,
    expand_groups,
    group_ranges,
    split_groups,
)
from fxquant.schemes.specs import TensorSpec


def range_qparams(
    low: Tensor,
    high: Tensor,
    grid: Grid,
    scale: ScaleFormat = FP32,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale (float32) and zero point (int32, None without one) of ranges [low, high], elementwise.

    Without a zero point the larger magnitude counts. The scale is one that ``scale`` stores.
    """
    if not grid.has_zero_point:
        largest = torch.maximum(-low, high).abs()
        return scale.scales(largest, grid, global_scale), None
    qmin, qmax = grid.codes
    found, zero_point = activation_qparams_from_range(low, high, qmin, qmax)
    if not isinstance(scale, HalfScale):
        return found, zero_point
    found = scale.nearest(found, grid)
    steps = qmin - low.to(torch.float32).clamp(max=0) / found
    return found, torch.round(steps).clamp(qmin, qmax).to(torch.int32)


def largest_of(x: Tensor, group_size: int) -> Tensor:
    """float32 [..., G]: max|x| of each group of the last dimension."""
    low, high = group_ranges(x, group_size)
    return torch.maximum(-low, high).abs().to(torch.float32)


def global_scale_of(x: Tensor, spec: TensorSpec) -> Tensor | None:
    """The scale that all groups of x share, float32 (); None where the spec's scales have none."""
    if not spec.scale.two_level:
        return None
    low, high = torch.aminmax(x)
    return spec.scale.global_scale(torch.maximum(-low, high).abs(), spec.grid)


@dataclass(frozen=True)
class Split:
    """An input x [..., K] as its quantizer sees it: ``clipped`` into the range, then ``rounded``.

    ``clipped - x`` is the clipping error, ``rounded - clipped`` the rounding error; the dtype is
    that of x. The clipped value lies within half a step of the rounded one. ``exact``: the clipped
    value rounded under the scale that max|x| gives, before that scale was rounded itself; where
    scales are not, this is ``rounded``.
    """

    clipped: Tensor
    rounded: Tensor
    exact: Tensor


@dataclass(frozen=True)
class Quantizer:
    """Quantize and dequantize a tensor, with the numerics of the converted graph, bit for bit.

    ``scale`` and ``zero_point`` (None where the grid has none) are given for a static range;
    without them they follow from the extremes of what arrives.
    """

    spec: TensorSpec
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    @property
    def rounds_scale(self) -> bool:
        """Whether a scale is kept in fewer bits than it is computed in."""
        return self.spec.scale != FP32

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale float32 and zero point int32 (None without one) for this x [..., K]."""
        if self.scale is not None:
            return self.scale, self.zero_point
        grid = self.spec.grid
        if self.rounds_scale:
            assert self.spec.group_size is not None
            ends = group_ranges(x, self.spec.group_size)
            return range_qparams(*ends, grid, self.spec.scale, global_scale_of(x, self.spec))
        reach = grid.codes if grid.has_zero_point else (-grid.reach, grid.reach)
        scale, zero_point = choose_qparams(
            x,
            *reach,
            symmetric=not grid.has_zero_point,
            granularity=self.spec.granularity,
            group_size=self.spec.group_size,
        )
        return scale, zero_point if grid.has_zero_point else None

    def codes(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Codes, one an element, of the grid's storage dtype."""
        grid = self.spec.grid
        if zero_point is None:
            return grid.nearest_codes(self._divided(x, scale))
        return grid.encode(self._steps(x, scale, zero_point).add_(self._spread(zero_point, x)))

    def rounded(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """What codes of x stand for, in x's dtype."""
        if self.spec.group_size is None or scale.dim() == 0:
            return self._steps(x, scale, zero_point).mul_(scale).to(x.dtype)
        # Broadcast over groups rather than spread by column: searches do this again and again.
        scales, shift = scale[..., None], None if zero_point is None else zero_point[..., None]
        steps = split_groups(x.to(torch.float32), self.spec.group_size) / scales
        values = self.spec.grid.nearest_(steps, shift).mul_(scales)
        return values.flatten(-2).narrow(-1, 0, x.shape[-1]).to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.rounded(x, *self.qparams(x))

    def split(self, x: Tensor) -> Split:
        """x clipped into its range, and rounded."""
        scale, zero_point = self.qparams(x)
        shift = 0 if zero_point is None else self._spread(zero_point, x)
        grid, spread = self.spec.grid, self._spread(scale, x)
        low, high = (grid.lowest - shift) * spread, (grid.highest - shift) * spread
        clipped = x.to(torch.float32).clamp(low, high).to(x.dtype)
        rounded = self.rounded(x, scale, zero_point)
        if not self.rounds_scale:
            return Split(clipped, rounded, rounded)
        plain = replace(self, spec=replace(self.spec, scale=FP32))
        return Split(clipped, rounded, plain.rounded(clipped, *plain.qparams(x)))

    def with_bits(self, bits: int) -> Quantizer:
        """The same range, or the same rule for it, on integers of ``bits`` bits (any number)."""
        old = self.spec.grid
        grid = IntegerGrid(bits, old.has_zero_point)
        spec = replace(self.spec, grid=grid, scale=FP32)
        if self.scale is None:
            return replace(self, spec=spec)
        steps = (old.highest - old.lowest) / (grid.highest - grid.lowest)
        scale = self.scale * steps
        if self.zero_point is None:
            return replace(self, spec=spec, scale=scale)
        qmin, qmax = grid.codes
        low = (old.lowest - self.zero_point) * self.scale
        zero_point = torch.round(qmin - low / scale).clamp(qmin, qmax).to(torch.int32)
        return Quantizer(spec, scale, zero_point)

    def _steps(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Numbers of the grid less the zero point, float32, in a fresh tensor."""
        shift = None if zero_point is None else self._spread(zero_point, x)
        return self.spec.grid.nearest_(self._divided(x, scale), shift)

    def _divided(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.div(x.to(torch.float32), self._spread(scale, x))

    def _spread(self, values: Tensor, x: Tensor) -> Tensor:
        return expand_groups(values, x.shape[-1] if x.dim() else 1, self.spec.group_size)
