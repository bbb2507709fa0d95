"""The scale of an input whose range is static, and what is recorded of how it was found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.numerics.observers import HistogramObserver
from fxquant.numerics.quantizer import Quantizer, range_qparams
from fxquant.numerics.ranges import distribution, estimate_range
from fxquant.schemes.specs import ActivationSpec
from fxquant.schemes.spelling import spell_estimator

HISTOGRAM_BINS = 40


@dataclass(frozen=True)
class StaticRange:
    """What a static input's SiteRecord says; see there."""

    scale: float
    zero_point: int
    estimator: str
    low: float
    high: float
    seen_low: float
    seen_high: float
    clipped: float
    histogram: tuple[int, ...]


def static_input(
    observer: HistogramObserver, spec: ActivationSpec
) -> tuple[dict[str, Tensor], StaticRange]:
    """Buffers ``input_scale`` and, when affine, ``input_zero_point``, 0-dim; and their record."""
    assert spec.estimator is not None
    seen = distribution(observer)
    low, high = estimate_range(observer, spec.estimator, spec.tensor, seen)
    buffers = _range_qparams(low, high, spec, observer.counts.device)
    return buffers, StaticRange(
        scale=float(buffers["input_scale"]),
        zero_point=int(buffers.get("input_zero_point", 0)),
        estimator=spell_estimator(spec.estimator),
        low=low,
        high=high,
        seen_low=float(observer.min_value),
        seen_high=float(observer.max_value),
        clipped=seen.share_outside(low, high),
        histogram=seen.histogram(HISTOGRAM_BINS),
    )


def static_quantizer(observer: HistogramObserver, spec: ActivationSpec) -> Quantizer:
    """The quantizer of a static input, in the range that ``static_input`` finds."""
    buffers = static_input(observer, spec)[0]
    return Quantizer(spec.tensor, buffers["input_scale"], buffers.get("input_zero_point"))


def _range_qparams(
    low: float, high: float, spec: ActivationSpec, device: torch.device
) -> dict[str, Tensor]:
    ends = torch.tensor([low, high], dtype=torch.float32, device=device)
    scale, zero_point = range_qparams(ends[0], ends[1], spec.tensor.grid)
    if zero_point is None:
        return {"input_scale": scale}
    return {"input_scale": scale, "input_zero_point": zero_point}
