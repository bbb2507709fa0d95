"""Integer grids: signed codes of 2 to 8 bits, symmetric or with a zero point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import SchemeError
from fxquant.formats.grid import Grid, Rounder


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Signed ``bits``-bit integers; without a zero point the lowest code is left out.

    Ties round to even. More than 8 bits are for analysis only: nothing stores them.
    """

    bits: int
    has_zero_point: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"int{self.bits}{'-asym' if self.has_zero_point else ''}"

    @property
    def codes(self) -> tuple[int, int]:
        highest = 2 ** (self.bits - 1) - 1
        return (-highest - 1 if self.has_zero_point else -highest), highest

    @property
    def lowest(self) -> float:  # type: ignore[override]
        return self.codes[0]

    @property
    def highest(self) -> float:  # type: ignore[override]
        return self.codes[1]

    @property
    def levels(self) -> tuple[float, ...]:  # type: ignore[override]
        low, high = self.codes
        return tuple(map(float, range(low, high + 1)))

    @property
    def quantum(self) -> float:
        return 1.0

    @property
    def storage(self) -> torch.dtype:  # type: ignore[override]
        return torch.int8 if self.bits <= 8 else torch.int32

    def rounder(self, zero_point: Tensor | None = None) -> Rounder:
        low, high = self.codes
        if zero_point is None:
            return lambda steps: steps.round_().clamp_(low, high)
        shift = zero_point.to(torch.float32)
        lowest, highest = low - shift, high - shift
        return lambda steps: torch.clamp(steps.round_(), lowest, highest, out=steps)

    def encode(self, values: Tensor) -> Tensor:
        return values.to(self.storage)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)


def integer(bits: int, symmetric: bool = True) -> IntegerGrid:
    """The grid of signed ``bits``-bit codes.

    >>> integer(8).codes, integer(4, symmetric=False).codes
    ((-127, 127), (-8, 7))

    Raises SchemeError unless bits is 2..8.
    """
    if not 2 <= bits <= 8:
        raise SchemeError(f"bits must be 2..8, got {bits}")
    return IntegerGrid(bits, not symmetric)
