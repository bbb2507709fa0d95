"""Exact Shapley values of the causes: what weights, clipping and rounding each add to the loss.

Shapley, "A value for n-person games" (1953): the mean, over the orders in which the parts can be
let in, of what a part adds. Three parts need 2^3 losses, and the values sum to their full effect;
with scales that are rounded there is a fourth, and 2^4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from fxquant.analysis.lab import Cuts, Lab, Setting, setting
from fxquant.analysis.parts import EVERY_CAUSE, Cause, Parts, no_figures, subsets
from fxquant.analysis.sites import SimulatedSite


def shapley(losses: Mapping[Parts, float], causes: Sequence[Cause]) -> dict[Cause, float]:
    """The value of each cause from the loss of every subset of ``causes``; 0 for others."""
    found = no_figures(causes)
    orders = list(itertools.permutations(causes))
    for order in orders:
        for index, cause in enumerate(order):
            before = frozenset(order[:index])
            found[cause] += losses[before | {cause}] - losses[before]
    return {cause: total / math.factorial(len(causes)) for cause, total in found.items()}


def present_causes(sites: Sequence[SimulatedSite]) -> list[Cause]:
    """The causes that any of the sites can have, in their usual order."""
    return [cause for cause in EVERY_CAUSE if any(cause in each.causes for each in sites)]


def causes_of(
    lab: Lab,
    group: Sequence[SimulatedSite],
    *,
    around: Sequence[SimulatedSite] = (),
    cuts: Cuts | None = None,
    known: Mapping[Parts, float] | None = None,
    remember: Callable[[str, Callable[[], float]], float],
) -> dict[Cause, float]:
    """Shapley values of the parts of ``group``, while ``around`` is quantized, the rest in float.

    They sum to L(around and group) - L(around). ``cuts`` hold every window before the group's
    first site, under ``around``; ``known`` losses are not run again; ``remember(name, compute)``
    keeps finished ones.
    """
    present = present_causes(group)
    outside = setting(each for each in around if each not in group)
    losses: dict[Parts, float] = {}
    for parts in subsets(present):
        if known is not None and parts in known:
            losses[parts] = known[parts]
            continue
        under: Setting = {**outside, **(setting(group, parts) if parts else {})}
        name = "+".join(cause for cause in EVERY_CAUSE if cause in parts) or "none"
        losses[parts] = remember(name, lambda under=under: lab.loss(under, cuts))  # type: ignore[misc]
    return shapley(losses, present)
