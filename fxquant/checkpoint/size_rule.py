"""Sizes grow evenly: what is tried at a few sizes holds at all.

Every extent of a saved graph is ``a + b * batch + c * length + d * batch * length``. An operation
makes its extents from those of its operands by copying, adding and multiplying them, by exact
division (reshape), and by cutting and rounding (slices, pieces, ``//``). Where operands grow evenly
on the rectangle of all sizes, cutting and rounding that agree with an even result at its corners
agree everywhere in it: an even function keeps its sign there if it does at the corners. Products
and quotients are polynomials of low degree, told apart from an even result at the sizes within, of
which one is drawn at each load. The largest value of an even extent stands at a corner.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.checkpoint.size_numbers import SEQUENCES

LONGEST = 2**24  # positions of any model: 10 million are known
_UNLIMITED = 2**17  # a length where a model has no limit
_BATCH = 2**12
_FITS = 2**48  # batch * length**2 of tensors whose bytes torch can still count

Size = tuple[int, int]
"""Batch and length."""


@dataclass(frozen=True)
class Sizes:
    """``tried``: a small size, others within, and the corners of all up to (batch, length)."""

    batch: int
    length: int
    tried: tuple[Size, ...]

    def uneven(self, found: list[tuple[Any, ...]]) -> str:
        """Why ``extents`` at each of the sizes are not those of one even growth; "" if they are."""
        if any(_kinds(each) != _kinds(found[0]) for each in found):
            return "it is of other kinds or dimensions at other sizes"
        for numbers in zip(*found, strict=True):
            if type(numbers[0]) is int and len(set(numbers)) > 1 and not self._even(numbers):
                few = ", ".join(
                    f"{n} for {b} x {t}" for n, (b, t) in zip(numbers, self.tried, strict=True)
                )
                return f"an extent is {few}"
        return ""

    def _even(self, numbers: tuple[int, ...]) -> bool:
        at = dict(zip(self.tried, numbers, strict=True))
        across, along = max(1, self.batch - 1), max(1, self.length - 1)
        ends = [at[b, t] for b in (1, self.batch) for t in (1, self.length)]
        for (batch, length), number in at.items():
            b, t = batch - 1, length - 1
            shares = ((across - b) * (along - t), (across - b) * t, b * (along - t), b * t)
            if number * across * along != sum(map(int.__mul__, shares, ends)):
                return False
        return True


def sizes_up_to(max_positions: int | None) -> Sizes:
    """The sizes to try of a graph for at most ``max_positions`` tokens a row, None: no limit."""
    length = max_positions or _UNLIMITED
    batch = max(4, min(_BATCH, _FITS // length**2))
    draw = random.SystemRandom()
    within = [(2, 5), (3, 7), (draw.randint(2, batch), draw.randint(1, length))]
    corners = [(1, 1), (batch, 1), (1, length), (batch, length)]
    small = [(b, min(t, length)) for b, t in within]
    return Sizes(batch, length, tuple(dict.fromkeys((*small, *corners))))


def extents(value: Any) -> tuple[Any, ...]:
    """Every extent of a tensor, and every number, of a value in order; types where it has none."""
    if isinstance(value, Tensor):
        return (Tensor, value.dim(), *value.shape)
    if isinstance(value, SEQUENCES):
        return (tuple, len(value), *(each for item in value for each in extents(item)))
    if type(value) is int:
        return (value,)
    return (repr(value) if isinstance(value, torch.dtype) else type(value).__name__,)


def _kinds(found: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(int if type(each) is int else each for each in found)
