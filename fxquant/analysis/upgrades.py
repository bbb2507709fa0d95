"""From measured effects to the order in which sites are given more bits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxquant.analysis.costs import Cost
from fxquant.ir.graph import Site
from fxquant.schemes.specs import SiteSpec


@dataclass(frozen=True)
class Rung:
    """One choice at one site: its cost, and its measured effect on the loss."""

    choice: str
    cost: float
    effect: float


def rungs_of(candidates: Sequence[Rung]) -> list[Rung]:
    """The choices worth taking, from the cheapest on: the lower convex hull of (cost, effect).

    Of two choices with one cost the better one stays. Along the hull each step gains less per cost
    than the one before, so that a greedy order over all sites is the optimum of the additive model
    at each of its points (Shoham and Gersho, 1988).
    """
    hull: list[Rung] = []
    for rung in sorted(candidates, key=lambda r: (r.cost, r.effect)):
        if hull and rung.effect >= hull[-1].effect:
            continue
        if hull and rung.cost == hull[-1].cost:
            continue
        while len(hull) > 1 and _gain(hull[-2], rung) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(rung)
    return hull


def _gain(below: Rung, above: Rung) -> float:
    """Loss gained per cost; the cost of ``above`` is higher."""
    return (below.effect - above.effect) / (above.cost - below.cost)


def priced(
    sites: Sequence[Site],
    specs: Mapping[str, SiteSpec],
    cost: Cost,
    effects: Mapping[str, Mapping[str, float]],
) -> dict[str, list[Rung]]:
    """Every choice of every site, by the site's path."""
    return {
        site.path: [
            Rung(name, cost(site, spec), effects[site.path][name]) for name, spec in specs.items()
        ]
        for site in sites
    }


def climbs(candidates: Mapping[str, Sequence[Rung]]) -> dict[str, list[Rung]]:
    """The rungs of every site, always up to the dearest choice.

    A small measured effect may be below 0 by chance; without the last rung no plan could climb out
    of it.
    """
    found = {}
    for path, own in candidates.items():
        hull = rungs_of(own)
        dearest = max(own, key=lambda r: (r.cost, -r.effect))
        found[path] = hull if hull[-1].choice == dearest.choice else [*hull, dearest]
    return found


def order_upgrades(steps: Mapping[str, Sequence[Rung]]) -> tuple[tuple[str, str], ...]:
    """(site, next choice) by gain per cost, best first; a site's own steps stay in order."""
    keyed = []
    for path, rungs in steps.items():
        least = float("inf")
        for index, (below, above) in enumerate(itertools.pairwise(rungs)):
            least = min(least, _gain(below, above))
            keyed.append((-least, index, path, above.choice))
    return tuple((path, choice) for _, _, path, choice in sorted(keyed, key=lambda k: k[:2]))


@dataclass(frozen=True)
class States:
    """The assignment after each number of upgrades."""

    start: dict[str, str]
    upgrades: tuple[tuple[str, str], ...]

    @property
    def total(self) -> int:
        return len(self.upgrades)

    def at(self, count: int) -> dict[str, str]:
        return {**self.start, **dict(self.upgrades[:count])}
