"""Formats that people call by one name: what a weight and an input then are.

``fp8`` is both, ``wfp8`` the weight alone, ``afp8`` the input; behind a format of MX its rule may
stand, ``mxfp4-rceil``. Printing a scheme shows what the name stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fxquant.errors import SchemeError
from fxquant.formats.floating import E2M1, E2M3, E4M3, E5M2
from fxquant.formats.grid import Grid
from fxquant.formats.integer import integer
from fxquant.formats.scales import E4M3_SCALE, POWERS, ScaleFormat
from fxquant.schemes.specs import ActivationSpec, Estimator, TensorSpec


@dataclass(frozen=True)
class Named:
    """The weight and the input of a named format."""

    weight: TensorSpec
    activation: ActivationSpec


def _blocks(grid: Grid, size: int, scale: ScaleFormat) -> Named:
    spec = TensorSpec(grid, "group", size, scale)
    return Named(spec, ActivationSpec(spec))


_FP8 = TensorSpec(E4M3, "channel")
NAMED: dict[str, Named] = {
    "fp8": Named(_FP8, ActivationSpec(TensorSpec(E4M3, "token"))),
    "fp8-static": Named(_FP8, ActivationSpec(TensorSpec(E4M3, "tensor"), Estimator("absmax"))),
    **{
        f"mxfp{bits}{scale.name.removeprefix('e8m0')}": _blocks(grid, 32, scale)
        for bits, grid in ((8, E4M3), (6, E2M3), (4, E2M1))
        for scale in POWERS
    },
    "nvfp4": _blocks(E2M1, 16, E4M3_SCALE),
}
# What attention's products and its cache of 8 bits may hold: the option ``format`` of their passes.
Format8 = Literal["int8", "fp8", "e4m3", "e5m2"]
_FORMATS8: dict[object, Grid] = {
    "int8": integer(8),
    "fp8": E4M3,
    "e4m3": E4M3,
    "e5m2": E5M2,
}
LONGEST_FIRST = sorted(NAMED, key=len, reverse=True)


def format8(name: object) -> Grid:
    """The grid of an option ``format``; SchemeError for another value."""
    if name not in _FORMATS8:
        raise SchemeError(f"format must be {', '.join(map(str, _FORMATS8))}, got {name!r}")
    return _FORMATS8[name]


def format8_of(options: Sequence[tuple[str, object]]) -> Grid:
    """The grid that a pass with these options stores 8 bits on; integers unless they say so."""
    return format8(dict(options).get("format", "int8"))
