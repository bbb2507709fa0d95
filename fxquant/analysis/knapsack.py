"""The choices of least summed effect that a limit of summed cost allows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fxquant.analysis.upgrades import Rung

MOST_SUMS = 2000


@dataclass(frozen=True, eq=False)
class _Sum:
    """Cost and effect of one choice at each site so far; ``before``: without the last site."""

    cost: float
    effect: float
    before: _Sum | None
    choice: str

    def choices(self) -> list[str]:
        found = []
        at: _Sum | None = self
        while at is not None and at.before is not None:
            found.append(at.choice)
            at = at.before
        return found[::-1]


def best_within(
    candidates: Mapping[str, Sequence[Rung]], limit: float, most: int = MOST_SUMS
) -> dict[str, str] | None:
    """The choice of each site, by its path; None where not even the cheapest keep ``limit``.

    Exact (Nemhauser and Ullmann, 1969): site by site, the sums are kept that no sum of at most
    their cost beats. Where these are more than ``most``, the best of those that share one of
    ``most`` equal parts of the costs is kept: the limit still holds, the optimum may be missed.
    """
    behind = sum(min(rung.cost for rung in rungs) for rungs in candidates.values())
    kept = [_Sum(0.0, 0.0, None, "")]
    for rungs in candidates.values():
        behind -= min(rung.cost for rung in rungs)
        grown = (
            _Sum(one.cost + rung.cost, one.effect + rung.effect, one, rung.choice)
            for one in kept
            for rung in rungs
            if one.cost + rung.cost + behind <= limit
        )
        kept = _thinned(_unbeaten(grown), most)
    if not kept:
        return None
    return dict(zip(candidates, kept[-1].choices(), strict=True))


def _unbeaten(sums: Iterable[_Sum]) -> list[_Sum]:
    """By rising cost and falling effect."""
    kept: list[_Sum] = []
    for one in sorted(sums, key=lambda each: (each.cost, each.effect)):
        if not kept or one.effect < kept[-1].effect:
            kept.append(one)
    return kept


def _thinned(sums: list[_Sum], most: int) -> list[_Sum]:
    """The last, which has the least effect, of each part of the range of costs; and the cheapest,
    without which a limit might seem to be out of reach."""
    if len(sums) <= most:
        return sums
    low, width = sums[0].cost, (sums[-1].cost - sums[0].cost) / most
    parts = {math.floor((one.cost - low) / width): one for one in sums[1:]}
    return [sums[0], *parts.values()]
