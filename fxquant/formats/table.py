"""Every grid and every format of scales that a scheme may name."""

from __future__ import annotations

from fxquant.errors import SchemeError
from fxquant.formats.floating import E2M1, E2M3, E3M2, E4M3, E5M2
from fxquant.formats.grid import Grid
from fxquant.formats.integer import integer
from fxquant.formats.levels import NF4
from fxquant.formats.scales import E4M3_SCALE, FP16, FP32, POWERS, ScaleFormat

GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        *(integer(bits) for bits in range(2, 9)),
        *(integer(bits, symmetric=False) for bits in range(2, 9)),
        *(E4M3, E5M2, E3M2, E2M3, E2M1, NF4),
    )
}
SCALES: dict[str, ScaleFormat] = {each.name: each for each in (FP32, FP16, *POWERS, E4M3_SCALE)}


def grid_named(name: str) -> Grid:
    """The grid that schemes and files call ``name``; SchemeError lists those that there are."""
    if name not in GRIDS:
        raise SchemeError(f"there is no number format {name!r}; known are {', '.join(GRIDS)}")
    return GRIDS[name]


def scales_named(name: str) -> ScaleFormat:
    """The format of scales called ``name``; SchemeError lists those that there are."""
    if name not in SCALES:
        raise SchemeError(f"there is no format of scales {name!r}; known are {', '.join(SCALES)}")
    return SCALES[name]
