"""Grids of a few numbers of their own, listed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fxquant.formats.grid import Grid, Rounder


@dataclass(frozen=True)
class LevelGrid(Grid):
    """At most 2^bits ascending numbers, 0 among them; the code is the number's place.

    Codes are counted from -2^(bits - 1), so that up to 4 bits two share a byte as integers do. A
    value in the middle between two numbers goes to the one with the even place. No zero point.
    """

    name: str
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if list(self.levels) != sorted(set(self.levels)) or 0.0 not in self.levels:
            raise ValueError(f"{self.name}: levels must ascend and hold 0, got {self.levels}")
        if not (3 <= len(self.levels) <= 256 and self.levels[0] < 0 < self.levels[-1]):
            raise ValueError(f"{self.name}: 3 to 256 levels on both sides of 0 make a grid")

    @property
    def bits(self) -> int:  # type: ignore[override]
        return max(2, (len(self.levels) - 1).bit_length())

    @property
    def has_zero_point(self) -> bool:  # type: ignore[override]
        return False

    @property
    def lowest(self) -> float:  # type: ignore[override]
        return self.levels[0]

    @property
    def highest(self) -> float:  # type: ignore[override]
        return self.levels[-1]

    @property
    def codes(self) -> tuple[int, int]:
        first = -(2 ** (self.bits - 1))
        return first, first + len(self.levels) - 1

    # Not kept: under fake tensors it would stay a fake one.
    def _table(self, device: torch.device) -> Tensor:
        return _made_there(self.levels, device)

    def _at(self, places: Tensor) -> Tensor:
        """The numbers at these places."""
        table = self._table(places.device)
        return table.index_select(0, places.reshape(-1)).view(places.shape)

    def _places(self, values: Tensor) -> Tensor:
        """Place of the nearest number, int64."""
        last, first = (_made_there(ends, values.device) for ends in _ends(self.levels))
        below = torch.bucketize(values, last)  # a middle itself belongs to the place below
        above = torch.bucketize(values, first, right=True)
        return torch.where(below % 2 == 0, below, above)

    def rounder(self, zero_point: Tensor | None = None) -> Rounder:
        if zero_point is not None:
            raise ValueError(f"{self.name} has no zero point")
        return self._round

    def _round(self, steps: Tensor) -> Tensor:
        found = self._at(self._places(steps))
        return steps.copy_(torch.where(torch.isnan(steps), steps, found))  # NaN has no place

    def encode(self, values: Tensor) -> Tensor:
        return (self._places(values) + self.codes[0]).to(self.storage)

    def decode(self, codes: Tensor) -> Tensor:
        return self._at(codes.to(torch.int64) - self.codes[0])


# The quantiles of a normal distribution that QLoRA takes (Dettmers et al. 2023, appendix E).
NF4 = LevelGrid(
    "nf4",
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)


@functools.cache
def _ends(levels: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The last float32 number up to each middle of two levels, and the first from it on.

    A middle that float32 does not hold lies between them: rounded to float32 it would belong to
    the farther level.
    """
    held = [_float32(level, round) for level in levels]
    middles = [(a + b) / 2 for a, b in pairwise(held)]
    last, first = ([_float32(m, way) for m in middles] for way in (math.floor, math.ceil))
    return tuple(last), tuple(first)


def _float32(number: float, rounding: Callable[[float], int]) -> float:
    mantissa, exponent = math.frexp(number)
    return math.ldexp(rounding(mantissa * 2**24), exponent - 24)


def _made_there(numbers: Sequence[float], device: torch.device) -> Tensor:
    """float32 [n]. On CUDA a copy from the host would wait, and could not be captured."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.float32, device=device)
    return torch.stack([torch.full((), each, device=device) for each in numbers])
