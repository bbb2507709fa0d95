"""Small floating-point grids: a sign, a few bits of exponent and of mantissa."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.formats.grid import Grid, Rounder
from fxquant.formats.packing import unpack_int4


@dataclass(frozen=True)
class FloatGrid(Grid):
    """Numbers ``±2^(e - bias) (1 + f / 2^mantissa)``, and those below without the leading 1.

    Ties round to even; what lies beyond ``highest`` saturates, and 0 keeps its sign. Codes are the
    bit patterns that hardware has: torch's float8 types for 8 bits, uint8 for fewer. Infinity and
    NaN, where a type has them, are no numbers of the grid. No zero point.
    """

    name: str
    exponent: int
    mantissa: int
    highest: float
    storage: torch.dtype = torch.uint8

    @property
    def bits(self) -> int:  # type: ignore[override]
        return 1 + self.exponent + self.mantissa

    @property
    def has_zero_point(self) -> bool:  # type: ignore[override]
        return False

    @property
    def lowest(self) -> float:  # type: ignore[override]
        return -self.highest

    @property
    def codes(self) -> tuple[int, int]:
        return 0, 2**self.bits - 1

    @property
    def _least_exponent(self) -> int:
        """Of a number that has the leading 1."""
        return 2 - int(2 ** (self.exponent - 1))

    @functools.cached_property
    def _magnitudes(self) -> tuple[float, ...]:
        """The number of each pattern without a sign, ascending."""
        found = []
        for pattern in range(2 ** (self.bits - 1)):
            exponent, fraction = divmod(pattern, 2**self.mantissa)
            lead = 2**self.mantissa if exponent else 0
            power = max(exponent, 1) - 1 + self._least_exponent - self.mantissa
            value = (lead + fraction) * 2.0**power
            if value > self.highest:
                break
            found.append(value)
        return tuple(found)

    @property
    def levels(self) -> tuple[float, ...]:  # type: ignore[override]
        above = self._magnitudes[1:]
        return (*(-value for value in reversed(above)), 0.0, *above)

    def rounder(self, zero_point: Tensor | None = None) -> Rounder:
        if zero_point is not None:
            raise ValueError(f"{self.name} has no zero point")
        return self._round

    def _round(self, steps: Tensor) -> Tensor:
        if steps.dtype != torch.float32:
            return steps.copy_(self._round(steps.to(torch.float32)))
        steps.clamp_(-self.highest, self.highest)
        # Beside 1.5 * 2^23 spacings float32 itself rounds to whole spacings, ties to even.
        large = self._powers(steps).mul_(1.5 * 2.0 ** (23 - self.mantissa))
        return torch.copysign((steps + large).sub_(large), steps, out=steps)

    def _powers(self, values: Tensor) -> Tensor:
        """2^e of the leading bit of each float32, at least that of the least normal number."""
        powers = values.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
        return powers.clamp_(min=2.0**self._least_exponent)

    def nearest_codes(self, steps: Tensor) -> Tensor:
        if not self.storage.is_floating_point or not _eager(steps):
            return super().nearest_codes(steps)
        # torch's own cast rounds to nearest, ties to even, as ``_round`` does.
        return self.encode(steps.clamp_(-self.highest, self.highest))

    def encode(self, values: Tensor) -> Tensor:
        if self.storage.is_floating_point:
            return values.to(self.storage)
        values = values.to(torch.float32)
        powers = self._powers(values)
        fraction = torch.div(values.abs(), powers).mul_(2.0**self.mantissa).to(torch.int32)
        exponent = (powers.view(torch.int32) >> 23) - (127 + self._least_exponent)
        sign = torch.signbit(values).to(torch.int32) << (self.bits - 1)
        return (fraction + (exponent << self.mantissa) + sign).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        if self.storage.is_floating_point:
            by_table = codes.is_cpu and _eager(codes)
            return self._of_bytes(codes) if by_table else codes.to(torch.float32)
        pattern = codes.to(torch.int32)
        magnitude = pattern & (2 ** (self.bits - 1) - 1)
        small = magnitude < 2**self.mantissa  # without the leading 1: add one, take it off again
        least = 2**self.mantissa * (self._least_exponent + 126)
        shifted = torch.where(small, magnitude + 2**self.mantissa, magnitude) + least
        values = (shifted << (23 - self.mantissa)).view(torch.float32)
        values = values - small.to(torch.float32) * 2.0**self._least_exponent
        return torch.where(pattern >= 2 ** (self.bits - 1), -values, values)

    def _of_bytes(self, codes: Tensor) -> Tensor:
        """Looked up: torch widens float8 one by one on the CPU, several times slower."""
        every = torch.arange(256, dtype=torch.uint8).view(self.storage).to(torch.float32)
        places = codes.view(torch.uint8).to(torch.int32)
        return every.index_select(0, places.reshape(-1)).view(codes.shape)

    def valid(self, codes: Tensor) -> bool:
        pattern = codes.view(torch.uint8)
        magnitude = pattern & (2 ** (self.bits - 1) - 1)
        beyond = (pattern >= 2**self.bits) if self.bits < 8 else torch.zeros((), dtype=torch.bool)
        return not bool(((magnitude >= len(self._magnitudes)) | beyond.to(pattern.device)).any())

    def unpack(self, stored: Tensor, length: int) -> Tensor:
        if not self.packed:
            return stored
        return unpack_int4(stored, length).view(torch.uint8) & 0xF


def _eager(x: Tensor) -> bool:
    """Whether no compiler traces: its code may cast in another way than torch's own."""
    return type(x) is Tensor and not torch.compiler.is_compiling()


E4M3 = FloatGrid("e4m3", 4, 3, 448.0, torch.float8_e4m3fn)
E5M2 = FloatGrid("e5m2", 5, 2, 57344.0, torch.float8_e5m2)
E3M2 = FloatGrid("e3m2", 3, 2, 28.0)
E2M3 = FloatGrid("e2m3", 2, 3, 7.5)
E2M1 = FloatGrid("e2m1", 2, 1, 6.0)
