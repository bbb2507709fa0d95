"""How the scales of groups are kept: fp32, fp16, powers of two in a byte, E4M3 under one in fp32.

``scales(largest, ...)`` gives float32 numbers that lie where the format can store them, so that
whoever divides by them need not know it; ``encode`` and ``decode`` are the way to bytes and back.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxquant.formats.floating import E4M3, FloatGrid
from fxquant.formats.grid import Grid

# The smallest fp32 scale: the reciprocal of any smaller (subnormal) number may be infinite.
MIN_SCALE = torch.finfo(torch.float32).tiny
Rule = Literal["floor", "ceil", "rceil", "even"]


def safe_scale(scale: Tensor) -> Tensor:
    """Scale 1 where the range is empty (all zeros), never subnormal elsewhere."""
    return torch.where(scale == 0, 1.0, scale.clamp(min=MIN_SCALE))


class ScaleFormat(abc.ABC):
    """``name``: as schemes and files spell it; ``bits`` of a scale; ``storage``: its dtype;
    ``two_level``: whether groups share one more; ``zero_points``: whether they may stand beside it.
    """

    name: str
    bits: int
    storage: torch.dtype
    two_level: bool = False
    zero_points: bool = False

    @abc.abstractmethod
    def scales(self, largest: Tensor, grid: Grid, global_scale: Tensor | None = None) -> Tensor:
        """float32: the scale of groups whose largest magnitude is ``largest``, float32."""

    def global_scale(self, largest: Tensor, grid: Grid) -> Tensor | None:
        """float32 (): the scale that all groups share, of the largest magnitude of all; or None."""
        return None

    @abc.abstractmethod
    def encode(self, scales: Tensor, global_scale: Tensor | None = None) -> Tensor:
        """How scales that ``scales`` gave are stored."""

    @abc.abstractmethod
    def decode(self, stored: Tensor, global_scale: Tensor | None = None) -> Tensor:
        """The inverse of ``encode``."""

    @abc.abstractmethod
    def valid(self, stored: Tensor) -> bool:
        """Whether each stored scale stands for a positive number."""


@dataclass(frozen=True)
class Fp32Scale(ScaleFormat):
    """``largest / reach`` as it is."""

    name: str = "fp32"
    bits: int = 32
    storage: torch.dtype = torch.float32
    zero_points: bool = True

    def scales(self, largest: Tensor, grid: Grid, global_scale: Tensor | None = None) -> Tensor:
        return safe_scale(largest.to(torch.float32) / grid.reach)

    def encode(self, scales: Tensor, global_scale: Tensor | None = None) -> Tensor:
        return scales

    def decode(self, stored: Tensor, global_scale: Tensor | None = None) -> Tensor:
        return stored

    def valid(self, stored: Tensor) -> bool:
        return bool((stored.isfinite() & (stored > 0)).all())


@dataclass(frozen=True)
class HalfScale(ScaleFormat):
    """``largest / reach`` to the nearest fp16 number, what GGUF, GPTQ and AWQ files hold.

    Beside zero points of up to 4 bits a scale has so few digits that its multiples by
    ``zero_point - lowest``, the minimum of a group, are fp16 numbers too.
    """

    name: str = "fp16"
    bits: int = 16
    storage: torch.dtype = torch.float16
    zero_points: bool = True

    def scales(self, largest: Tensor, grid: Grid, global_scale: Tensor | None = None) -> Tensor:
        return self.nearest(safe_scale(largest.to(torch.float32) / grid.reach), grid)

    def nearest(self, scale: Tensor, grid: Grid) -> Tensor:
        """float32: the nearest to ``scale``, float32 and positive, that it stores."""
        most, found = 65504.0, scale.clamp(min=2.0**_HALF_LEAST)
        if grid.has_zero_point and grid.bits <= 4:
            found = _with_digits(found, _HALF_DIGITS - grid.bits)
            most = 2.0 ** (_HALF_TOP - grid.bits)
        found = found.clamp(max=most).to(torch.float16).to(torch.float32)
        return torch.where(scale.isfinite(), found, scale)

    def encode(self, scales: Tensor, global_scale: Tensor | None = None) -> Tensor:
        return scales.to(torch.float16)

    def decode(self, stored: Tensor, global_scale: Tensor | None = None) -> Tensor:
        return stored.to(torch.float32)

    def valid(self, stored: Tensor) -> bool:
        return bool((stored.isfinite() & (stored > 0)).all())


_HALF_DIGITS, _HALF_TOP = 11, 16  # of a mantissa, and the power that fp16 does not reach
_HALF_LEAST = -24  # the power that is its smallest number


def _with_digits(x: Tensor, digits: int) -> Tensor:
    """float32 ``x``, at least 2^-24, rounded to so many binary digits, ties to even; to fewer where
    fp16 holds no more, so that the nearest is not missed by rounding twice."""
    bits = x.view(torch.int32)
    exponent = (bits >> 23) - 126
    gone = 24 - digits + (digits + _HALF_LEAST - exponent).clamp(min=0)
    half = torch.ones_like(bits) << (gone - 1)
    bits = bits + half - 1 + ((bits >> gone) & 1)
    return ((bits >> gone) << gone).view(torch.float32)


@dataclass(frozen=True)
class PowerScale(ScaleFormat):
    """E8M0: a power of two, its exponent plus 127 in a byte; 255 is NaN (OCP MX, section 5.4.1).

    ``rule``: how the power follows from the largest magnitude. floor: 2^(floor(log2 largest) -
    emax), OCP's own, which clips up to what lies between 2^emax and the grid's end; ceil: one more
    unless largest is itself a power; rceil: 2^ceil(log2(largest / reach)), which clips nothing;
    even: floor of largest rounded to the grid's mantissa.
    """

    rule: Rule
    bits: int = 8
    storage: torch.dtype = torch.uint8

    @property
    def name(self) -> str:  # type: ignore[override]
        return "e8m0" if self.rule == "floor" else f"e8m0-{self.rule}"

    def scales(self, largest: Tensor, grid: Grid, global_scale: Tensor | None = None) -> Tensor:
        return self.decode(self._exponents(largest.to(torch.float32), grid))

    def _exponents(self, largest: Tensor, grid: Grid) -> Tensor:
        finite = torch.isfinite(largest)
        if self.rule == "rceil":
            # In float64: a quotient just above a power of two may be that power in float32.
            bits = (largest.to(torch.float64) / grid.reach).view(torch.int64)
            above = ((bits & (2**52 - 1)) != 0).to(torch.int64)
            found = (bits >> 52) - (1023 - 127) + above
        else:
            bits = largest.view(torch.int32)
            if self.rule == "even":
                bits = bits + (1 << (22 - _mantissa(grid)))
            found = (bits >> 23) & 0xFF
            if self.rule == "ceil":
                found = found + ((bits & 0x7FFFFF) != 0).to(torch.int32)
            found = found - grid.top_exponent
        return torch.where(finite, found.clamp(0, 254), 255).to(torch.uint8)

    def encode(self, scales: Tensor, global_scale: Tensor | None = None) -> Tensor:
        return ((scales.view(torch.int32) >> 23) & 0xFF).to(torch.uint8)

    def decode(self, stored: Tensor, global_scale: Tensor | None = None) -> Tensor:
        bits = stored.to(torch.int32) << 23
        bits = torch.where(stored == 0, 0x400000, bits)  # 2^-127 has no leading 1 in float32
        return torch.where(stored == 255, 0x7FC00000, bits).to(torch.int32).view(torch.float32)

    def valid(self, stored: Tensor) -> bool:
        return not bool((stored == 255).any())


def _mantissa(grid: Grid) -> int:
    if not isinstance(grid, FloatGrid):
        raise ValueError(f"{grid.name} has no mantissa, to which the rule even rounds")
    return grid.mantissa


@dataclass(frozen=True)
class CodedScale(ScaleFormat):
    """E4M3 numbers from 2^-6 to 448 times one fp32 scale of the tensor: NVFP4's two levels."""

    name: str = "e4m3"
    bits: int = 8
    storage: torch.dtype = torch.float8_e4m3fn
    two_level: bool = True

    def global_scale(self, largest: Tensor, grid: Grid) -> Tensor | None:
        return safe_scale(largest.to(torch.float32) / (E4M3.highest * grid.reach))

    def scales(self, largest: Tensor, grid: Grid, global_scale: Tensor | None = None) -> Tensor:
        assert global_scale is not None
        wanted = largest.to(torch.float32) / grid.reach / global_scale
        least = torch.finfo(self.storage).tiny
        return E4M3.nearest_(wanted.clamp_(least, E4M3.highest)).mul_(global_scale)

    def encode(self, scales: Tensor, global_scale: Tensor | None = None) -> Tensor:
        assert global_scale is not None
        return (scales / global_scale).to(self.storage)

    def decode(self, stored: Tensor, global_scale: Tensor | None = None) -> Tensor:
        assert global_scale is not None
        return stored.to(torch.float32) * global_scale

    def valid(self, stored: Tensor) -> bool:
        return E4M3.valid(stored) and bool((stored.to(torch.float32) > 0).all())


FP32 = Fp32Scale()
FP16 = HalfScale()
POWERS = tuple(PowerScale(rule) for rule in ("floor", "ceil", "rceil", "even"))
E4M3_SCALE = CodedScale()
