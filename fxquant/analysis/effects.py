"""Exact effects of sites on the loss: alone, rescue, in order; for sites or groups of them.

One walk along the graph serves all three. A trial differs from the walk's own setting only at its
group, so the values before the group's first site are kept and only the rest is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, get_args

from fxquant.analysis.lab import FLOAT_SETTING, Cuts, Lab, Setting, setting
from fxquant.analysis.sites import SimulatedSite

Remember = Callable[[str, Callable[[], float]], float]
Effect = Literal["alone", "rescue", "in_order"]
EFFECTS: tuple[Effect, ...] = get_args(Effect)
By = Literal["kinds", "blocks"]
WORST: Final = "in_order:worst"


@dataclass(frozen=True)
class Trials:
    """An exact effect: of each site, or ``by`` kinds or blocks, whose sites change together."""

    effect: Effect
    by: By | None = None

    def __str__(self) -> str:
        return self.effect if self.by is None else f"{self.effect}:{self.by}"


GROUPED: Final = {
    str(trials): trials for trials in (Trials(e, by) for e in EFFECTS for by in get_args(By))
}
TRIALS: Final = {effect: Trials(effect) for effect in EFFECTS} | GROUPED
"""By the names that ``explain`` takes as methods."""


@dataclass(frozen=True)
class Group:
    """Sites that are quantized, or left in float, together."""

    name: str
    sites: tuple[SimulatedSite, ...]


def effects(
    lab: Lab,
    effect: Effect,
    groups: Sequence[Group],
    sites: Sequence[SimulatedSite],
    remember: Remember,
) -> Iterator[tuple[str, float]]:
    """(name, loss) of each group's trial, in the order of the groups' first sites.

    The losses, not yet differences: ``alone`` with only the group quantized, ``rescue`` with all
    ``sites`` but the group, ``in_order`` with the group and every group before it.
    ``remember(name, compute)`` keeps finished losses. Cost: about half a forward a site, since a
    trial runs from its first site on.
    """
    done: tuple[SimulatedSite, ...] = ()
    cuts = lab.start()
    for group in ordered(lab, groups):
        first = first_site(lab, group.sites)
        before, trial = _settings(effect, group, sites, done)
        cuts = lab.advance(cuts, first.node, before)
        done += group.sites
        yield group.name, remember(group.name, partial(lab.loss, trial, cuts))


def _settings(
    effect: Effect,
    group: Group,
    sites: Sequence[SimulatedSite],
    done: tuple[SimulatedSite, ...],
) -> tuple[Setting, Setting]:
    """What runs before the group's first site, and in the trial."""
    if effect == "alone":
        return FLOAT_SETTING, setting(group.sites)
    if effect == "rescue":
        return setting(sites), setting(each for each in sites if each not in group.sites)
    return setting(done), setting((*done, *group.sites))


def ordered(lab: Lab, groups: Sequence[Group]) -> list[Group]:
    """The groups by the position of their first site in the graph."""
    return sorted(groups, key=lambda group: lab.position(first_site(lab, group.sites).node))


def first_site(lab: Lab, sites: Sequence[SimulatedSite]) -> SimulatedSite:
    return min(sites, key=lambda each: lab.position(each.node))


def as_effects(
    effect: Effect, losses: dict[str, float], loss_float: float, loss_quantized: float
) -> dict[str, float]:
    """From the trials' losses, in order, to the effects in nats.

    ``alone`` L(only s) - L(float); ``rescue`` L(all) - L(all but s); ``in_order`` the loss added
    by s to those before it: these sum to L(all) - L(float), by telescoping.
    """
    if effect == "alone":
        return {name: loss - loss_float for name, loss in losses.items()}
    if effect == "rescue":
        return {name: loss_quantized - loss for name, loss in losses.items()}
    before = [loss_float, *losses.values()]
    return {name: loss - before[i] for i, (name, loss) in enumerate(losses.items())}


def walk_to(
    lab: Lab, sites: Sequence[SimulatedSite], wanted: Sequence[SimulatedSite]
) -> Iterator[tuple[SimulatedSite, Cuts]]:
    """Each wanted site with the cuts before it in the fully quantized graph, in graph order."""
    cuts, under = lab.start(), setting(sites)
    for each in sorted(wanted, key=lambda site: lab.position(site.node)):
        cuts = lab.advance(cuts, each.node, under)
        yield each, cuts
