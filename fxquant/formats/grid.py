"""Grid: what one element of a quantized tensor may be, and how it is stored."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.formats.packing import pack_int4, unpack_int4

Rounder = Callable[[Tensor], Tensor]


class Grid(abc.ABC):
    """The numbers on which a tensor's elements lie once they are divided by their scale.

    ``value = x / scale + zero_point`` goes to the nearest number of the grid; ``code`` is how that
    number is stored. For integers the two are the same.

    Attributes, which a frozen dataclass or its properties give:
        name: how schemes and files spell it, ``int8``.
        bits: what an element needs.
        has_zero_point: whether ranges need not be symmetric about 0.
        lowest, highest: the ends of the grid.
        levels: every number, ascending.
        storage: dtype of the codes, one an element.
    """

    name: str
    bits: int
    has_zero_point: bool
    lowest: float
    highest: float
    levels: tuple[float, ...]
    storage: torch.dtype = torch.int8

    @property
    def reach(self) -> float:
        """The largest magnitude that has a number at both ends: absmax / scale."""
        return min(-self.lowest, self.highest)

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.bits <= 4

    @abc.abstractmethod
    def rounder(self, zero_point: Tensor | None = None) -> Rounder:
        """What moves ``x / scale``, float32 and in place, to the nearest ``number - zero_point``.

        Saturates at the ends; NaN stays NaN. ``zero_point`` (integers, any dtype) broadcasts
        against x; only grids that have one take it.
        """

    def nearest_(self, steps: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """``steps = x / scale`` (float32) moved in place to the nearest ``number - zero_point``."""
        return self.rounder(zero_point)(steps)

    def nearest_codes(self, steps: Tensor) -> Tensor:
        """The codes of the numbers nearest to ``steps = x / scale`` (float32), which are used up;
        no zero point."""
        return self.encode(self.nearest_(steps))

    @abc.abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """The codes, of dtype ``storage``, of numbers of the grid, float32."""

    @abc.abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The numbers, float32, that codes stand for."""

    @property
    @abc.abstractmethod
    def codes(self) -> tuple[int, int]:
        """The lowest and highest code as integers; bit patterns where a code is no integer."""

    @functools.cached_property
    def quantum(self) -> float:
        """The largest power of two of which every number is a multiple."""
        return 1.0 / max(level.as_integer_ratio()[1] for level in map(float, self.levels))

    @property
    def top_exponent(self) -> int:
        """floor(log2(reach)): emax in the definition of MX."""
        return math.frexp(self.reach)[1] - 1

    def valid(self, codes: Tensor) -> bool:
        """Whether each of these codes, of dtype ``storage``, stands for a number."""
        low, high = self.codes
        return bool(((codes >= low) & (codes <= high)).all())

    def pack(self, codes: Tensor) -> Tensor:
        """Codes [N, K] as they are kept: two a byte, uint8 [N, ceil(K / 2)], where they fit."""
        return pack_int4(codes) if self.packed else codes

    def unpack(self, stored: Tensor, length: int) -> Tensor:
        """The inverse of pack: codes [N, length]."""
        return unpack_int4(stored, length) if self.packed else stored
