"""Every grid that a scheme may name."""

from __future__ import annotations

from fxquant.errors import SchemeError
from fxquant.formats.grid import Grid
from fxquant.formats.integer import integer

GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        *(integer(bits) for bits in range(2, 9)),
        *(integer(bits, symmetric=False) for bits in range(2, 9)),
    )
}


def grid_named(name: str) -> Grid:
    """The grid that schemes and files call ``name``; SchemeError lists those that there are."""
    if name not in GRIDS:
        raise SchemeError(f"there is no number format {name!r}; known are {', '.join(GRIDS)}")
    return GRIDS[name]
