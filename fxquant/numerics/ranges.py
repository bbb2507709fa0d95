"""Range estimators: from a calibrated histogram to the range [low, high] of a static quantizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.formats.grid import Grid
from fxquant.formats.integer import IntegerGrid
from fxquant.numerics.observers import BINS, HistogramObserver
from fxquant.numerics.quantizer import range_qparams
from fxquant.schemes.specs import Estimator, TensorSpec

_POINTS_PER_BIN = 4  # where a bin is about as wide as a step, its centre alone would mislead
_CANDIDATES = 160
_KL_BINS = 2048


@dataclass(frozen=True)
class Distribution:
    """A histogram's non-empty bins in ascending order, float64: edges and counts [B]."""

    lower: Tensor
    upper: Tensor
    counts: Tensor

    @property
    def total(self) -> float:
        return float(self.counts.sum())

    def magnitude(self) -> Distribution:
        """The distribution of |x|, from that of x whose bins do not straddle 0.

        Bins of both signs with the same near edge are one: no two overlap.
        """
        negative = self.upper <= 0
        near = torch.where(negative, self.upper, self.lower).abs()
        far = torch.where(negative, self.lower, self.upper).abs()
        lower, place = torch.unique(near, return_inverse=True)
        upper = torch.zeros_like(lower).scatter_reduce(0, place, far, "amax")
        counts = torch.zeros_like(lower).index_add_(0, place, self.counts)
        return Distribution(lower, upper, counts)

    def quantile(self, share: float) -> float:
        """Smallest v with at least ``share`` of the counts at or below, linear inside a bin."""
        cumulative = self.counts.cumsum(0)
        target = share * self.total
        index = min(int(torch.searchsorted(cumulative, target)), len(cumulative) - 1)
        inside = 1 - float((cumulative[index] - target) / self.counts[index])
        return float(self.lower[index] + (self.upper[index] - self.lower[index]) * inside)

    def share_outside(self, low: float, high: float) -> float:
        """Share of the counts below ``low`` or above ``high``, linear inside a bin."""
        width = (self.upper - self.lower).clamp(min=torch.finfo(torch.float64).tiny)
        inside = (self.upper.clamp(max=high) - self.lower.clamp(min=low)) / width
        single = self.upper == self.lower
        within = (self.lower >= low) & (self.upper <= high)
        share = torch.where(single, within.double(), inside.clamp(0, 1))
        return float(((1 - share) * self.counts).sum() / self.total)

    def histogram(self, bins: int) -> tuple[int, ...]:
        """Counts in equal bins from the smallest to the largest value, by each bin's centre."""
        low, high = float(self.lower[0]), float(self.upper[-1])
        centre = ((self.lower + self.upper) / 2 - low) / max(high - low, 1e-300)
        index = (centre * bins).long().clamp(0, bins - 1)
        counts = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, self.counts)
        return tuple(map(int, counts.tolist()))

    def points(self) -> tuple[Tensor, Tensor]:
        """Representative values and their weights: a few evenly inside each bin."""
        steps = (torch.arange(_POINTS_PER_BIN, dtype=torch.float64) + 0.5) / _POINTS_PER_BIN
        values = self.lower[:, None] + (self.upper - self.lower)[:, None] * steps
        weights = (self.counts / _POINTS_PER_BIN)[:, None].expand_as(values)
        return values.reshape(-1), weights.reshape(-1)


def distribution(observer: HistogramObserver) -> Distribution:
    """The observer's non-empty bins, the outer edges tightened to the exact extremes.

    Raises CalibrationError when the observer has seen nothing.
    """
    if int(observer.tokens) == 0:
        raise CalibrationError(
            f"{observer.site}: calibration saw no token here; its range is unknown. "
            "Give calibration batches with at least one attended token"
        )
    bins = torch.arange(BINS, dtype=torch.int32)
    near = (bins << 16).view(torch.float32).to(torch.float64)
    far = ((bins << 16) | 0xFFFF).view(torch.float32).to(torch.float64)
    counts = observer.counts.cpu()
    used = counts > 0
    lower, upper = torch.minimum(near, far)[used], torch.maximum(near, far)[used]
    low, high = float(observer.min_value), float(observer.max_value)
    order = torch.argsort(lower, stable=True)
    return Distribution(
        lower[order].clamp(low, high), upper[order].clamp(low, high), counts[used][order].double()
    )


def estimate_range(
    observer: HistogramObserver,
    estimator: Estimator,
    spec: TensorSpec,
    seen: Distribution | None = None,
) -> tuple[float, float]:
    """The range of a static per-tensor quantizer.

    Symmetric specs get ``(-t, t)``. Percentile p of |x| (symmetric), or the quantiles that leave
    (100 - p)/2 percent outside at each end (affine), so that both clip the same share. MSE: the
    range with the least expected squared error. Entropy: the least Kullback-Leibler divergence
    (Migacz, "8-bit inference with TensorRT", 2017) over ranges shrunk evenly. ``seen``: the
    observer's distribution, where it is at hand.
    """
    seen = seen or distribution(observer)
    low, high = float(observer.min_value), float(observer.max_value)
    if not spec.grid.has_zero_point:
        high = max(-low, high)
        low = -high
    if estimator.kind == "absmax" or high == low:
        return low, high
    if estimator.kind == "percentile":
        assert estimator.percent is not None
        return _percentile(seen, estimator.percent / 100, not spec.grid.has_zero_point)
    if estimator.kind == "mse":
        return _least_mse(seen, low, high, spec)
    return _least_divergence(seen, low, high, spec)


def _percentile(seen: Distribution, share: float, symmetric: bool) -> tuple[float, float]:
    if symmetric:
        limit = seen.magnitude().quantile(share)
        return -limit, limit
    outside = (1 - share) / 2
    return seen.quantile(outside), seen.quantile(1 - outside)


def _squared_error(seen: Distribution, low: Tensor, high: Tensor, spec: TensorSpec) -> Tensor:
    """Expected squared error of each candidate range ``[C]``: float64 [C]."""
    scales, zero_points = range_qparams(low, high, spec.grid)
    values, weights = seen.points()
    errors = []
    for index, scale in enumerate(scales.double()):
        shift = None if zero_points is None else zero_points[index]
        nearest = spec.grid.nearest_(values / scale, shift)
        errors.append(((nearest * scale - values).square() * weights).sum())
    return torch.stack(errors)


def _least_mse(
    seen: Distribution, low: float, high: float, spec: TensorSpec
) -> tuple[float, float]:
    shrink = torch.linspace(1 / _CANDIDATES, 1, _CANDIDATES, dtype=torch.float64)
    best = shrink[_squared_error(seen, low * shrink, high * shrink, spec).argmin()]
    low, high = low * float(best), high * float(best)
    if not spec.grid.has_zero_point:
        return low, high
    # Then each end alone: the tails of an affine range are rarely alike.
    ends = torch.linspace(0.25, 1.5, _CANDIDATES // 2, dtype=torch.float64)
    ends = torch.cat((ends, torch.ones(1, dtype=torch.float64)))
    full_low, full_high = float(seen.lower[0]), float(seen.upper[-1])
    lows = (low * ends).clamp(min=min(full_low, 0))
    low = float(lows[_squared_error(seen, lows, torch.full_like(lows, high), spec).argmin()])
    highs = (high * ends).clamp(max=max(full_high, 0))
    high = float(highs[_squared_error(seen, torch.full_like(highs, low), highs, spec).argmin()])
    return low, high


def _least_divergence(
    seen: Distribution, low: float, high: float, spec: TensorSpec
) -> tuple[float, float]:
    """KL divergence between the clipped distribution and its quantized form, over 2048 bins.

    Integers without a zero point: |x| against ``2**(bits-1)`` levels, as TensorRT; with one: x
    against ``2**bits``. Another grid: x against its own numbers.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    grid = spec.grid
    symmetric = isinstance(grid, IntegerGrid) and not grid.has_zero_point
    start, source = (0.0, seen.magnitude()) if symmetric else (low, seen)
    levels = 2 ** (grid.bits - symmetric) if isinstance(grid, IntegerGrid) else len(grid.levels)
    values, weights = source.points()
    index = ((values - start) / (high - start) * _KL_BINS).long().clamp_(0, _KL_BINS - 1)
    histogram = torch.zeros(_KL_BINS, dtype=torch.float64).index_add_(0, index, weights)
    zero_bin = 0 if symmetric else int(-low / (high - low) * _KL_BINS)
    histogram[min(zero_bin, _KL_BINS - 1)] = 0  # exact zeros quantize without error
    if not histogram.sum():
        return low, high
    best, best_divergence = 1.0, float("inf")
    for step in range(levels + (_KL_BINS - levels) % 16, _KL_BINS + 1, 16):
        share = step / _KL_BINS
        first = 0 if symmetric else round((_KL_BINS - step) * -low / (high - low))
        level = _level_of_bins(grid, step, levels)
        divergence = _divergence(histogram, first, level, levels)
        if divergence < best_divergence:
            best, best_divergence = share, divergence
    return low * best, high * best


def _level_of_bins(grid: Grid, bins: int, levels: int) -> Tensor:
    """Which number of the grid each of ``bins`` even bins of a range becomes: int64 [bins]."""
    index = torch.arange(bins)
    if isinstance(grid, IntegerGrid):
        return index * levels // bins
    centres = ((index + 0.5) / bins * 2 - 1) * grid.reach
    numbers = torch.tensor(grid.levels)
    return torch.searchsorted(numbers, grid.nearest_(centres.to(torch.float32)))


def _divergence(histogram: Tensor, first: int, level: Tensor, levels: int) -> float:
    """KL(P || Q): P has the outside added to its end bins, Q the inside merged to ``levels``, that
    of each bin given."""
    last = first + len(level)
    inside = histogram[first:last]
    clipped = inside.clone()
    clipped[0] += histogram[:first].sum()
    clipped[-1] += histogram[last:].sum()
    filled = (inside > 0).double()
    mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, inside)
    width = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    quantized = (mass / width.clamp(min=1))[level] * filled
    # Both over all counts: what Q lacks of them was clipped, and costs to second order.
    p, q = clipped / histogram.sum(), quantized / histogram.sum()
    used = p > 0
    # A clipped bin that was empty inside has no counterpart in Q; TensorRT smooths it likewise.
    return float((p[used] * (p[used] / q[used].clamp(min=1e-12)).log()).sum() + q.sum() - 1)
