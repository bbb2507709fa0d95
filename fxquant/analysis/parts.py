"""The parts of a quantization error, and the quantizer of an input taken apart into them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from fxquant.quantization import choose_qparams, dequantize, encode
from fxquant.specs import ActivationSpec, Granularity

Cause = Literal["weights", "clipping", "rounding"]
CAUSES: tuple[Cause, ...] = get_args(Cause)
Parts = frozenset[Cause]
EVERY_PART: Parts = frozenset(CAUSES)


def subsets(causes: Iterable[Cause]) -> list[Parts]:
    """Every subset, the empty one first, each after all that it contains."""
    listed = list(causes)
    return [
        frozenset(chosen)
        for size in range(len(listed) + 1)
        for chosen in itertools.combinations(listed, size)
    ]


@dataclass(frozen=True)
class Split:
    """An input x [..., K] as its quantizer sees it: ``clipped`` into the range, then ``rounded``.

    ``clipped - x`` is the clipping error, ``rounded - clipped`` the rounding error; the dtype is
    that of x. The clipped value lies within half a step of the rounded one.
    """

    clipped: Tensor
    rounded: Tensor


@dataclass(frozen=True)
class InputQuantizer:
    """Quantize and dequantize one input, with the numerics of the converted graph.

    ``scale`` and ``zero_point`` are 0-dim for a static range, None for a dynamic one, which
    follows from the x that arrives. ``qmin`` and ``qmax`` may be wider than int8.
    """

    qmin: int
    qmax: int
    symmetric: bool
    granularity: Granularity
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    @classmethod
    def of(
        cls, spec: ActivationSpec, scale: Tensor | None, zero_point: Tensor | None
    ) -> InputQuantizer:
        qmin, qmax = spec.tensor.qrange
        return cls(qmin, qmax, spec.tensor.symmetric, spec.tensor.granularity, scale, zero_point)

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale float32 and zero point int32 (None when symmetric) for this x."""
        if self.scale is not None:
            return self.scale, self.zero_point
        scale, zero_point = choose_qparams(
            x, self.qmin, self.qmax, symmetric=self.symmetric, granularity=self.granularity
        )
        return scale, None if self.symmetric else zero_point

    def rounded(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """What stands behind quantize and dequantize in the graph, bit for bit."""
        codes = encode(x, scale, zero_point, self.qmin, self.qmax, torch.float32)
        return dequantize(codes, scale, zero_point, dtype=x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.rounded(x, *self.qparams(x))

    def split(self, x: Tensor) -> Split:
        scale, zero_point = self.qparams(x)
        shift = 0 if zero_point is None else zero_point
        low, high = (self.qmin - shift) * scale, (self.qmax - shift) * scale
        clipped = x.to(torch.float32).clamp(low, high).to(x.dtype)
        return Split(clipped, self.rounded(x, scale, zero_point))

    def with_parts(self, x: Tensor, parts: Parts) -> Tensor:
        """x with the clipping error, the rounding error, both or none."""
        if "clipping" in parts and "rounding" in parts:
            return self(x)
        if not parts & {"clipping", "rounding"}:
            return x
        split = self.split(x)
        return split.clipped if "clipping" in parts else x + (split.rounded - split.clipped)

    def with_bits(self, bits: int) -> InputQuantizer:
        """The same range, or the same rule for it, in ``bits`` bits (any number)."""
        qmax = 2 ** (bits - 1) - 1
        qmin = -qmax if self.symmetric else -qmax - 1
        if self.scale is None:
            return replace(self, qmin=qmin, qmax=qmax)
        scale = self.scale * ((self.qmax - self.qmin) / (qmax - qmin))
        if self.zero_point is None:
            return replace(self, qmin=qmin, qmax=qmax, scale=scale)
        low = (self.qmin - self.zero_point) * self.scale
        zero_point = torch.round(qmin - low / scale).clamp(qmin, qmax).to(torch.int32)
        return replace(self, qmin=qmin, qmax=qmax, scale=scale, zero_point=zero_point)
