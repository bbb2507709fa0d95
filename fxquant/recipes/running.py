"""At which level a graph is run: the fastest one that gives the figures of level integer."""

from __future__ import annotations

from typing import Final

import torch
from torch.fx import GraphModule

from fxquant.errors import SchemeError
from fxquant.ir.graph import Level, device_of, info
from fxquant.recipes.conversion import recipe
from fxquant.schemes.scheme import Scheme

AUTO: Final = "auto"
# The levels at which a quantized site computes what its scheme says.
RUNNING: Final = (AUTO, *map(str, (Level.QDQ, Level.INTEGER, Level.KERNELS, Level.INEXACT)))


def running_level(level: str, device: str | torch.device) -> str:
    """``level``, where "auto" is "kernels" on CUDA and "integer" elsewhere: the same bits.

    "kernels-inexact" is other bits, and has to be asked for.

    Raises SchemeError for a level at which no scheme is measured.
    """
    if level not in RUNNING:
        raise SchemeError(f"no scheme is measured at level {level!r}: give {', '.join(RUNNING)}")
    if level != AUTO:
        return level
    return str(Level.KERNELS if torch.device(device).type == "cuda" else Level.INTEGER)


def as_run(graph: GraphModule, level: str = AUTO) -> GraphModule:
    """A graph at the level that it is run at, by the passes that lead there from its own.

    "auto": an integer graph on CUDA is fused, every other one stays. A float graph has nothing to
    lower. Raises SchemeError where no pass leads to ``level``.
    """
    facts = info(graph)
    wanted = running_level(level, device_of(graph))
    unasked = level == AUTO and (facts.level, wanted) != (Level.INTEGER, Level.KERNELS)
    if facts.level in (Level.FLOAT, wanted) or unasked:
        return graph
    return recipe(Scheme.parse(facts.scheme), start=str(facts.level), level=wanted).run(graph)
