"""in_order where it counts: block by block, then site by site within the worst blocks.

Both are cuts of one chain of losses, of which in_order is the steps: everything up to a site is
quantized, the rest is float. So the figures are those of in_order, and still sum to L(all) -
L(float): the sites of the worst blocks, and the other blocks as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fxquant.analysis.effects import Remember
from fxquant.analysis.lab import Lab, setting
from fxquant.analysis.sites import SimulatedSite

ALLOWANCE = 10.0  # forwards that the sites of the worst blocks may cost together
Over = Callable[[Iterable[tuple[SimulatedSite, float]], int], Iterable[tuple[SimulatedSite, float]]]


@dataclass(frozen=True)
class Steps:
    """What sites add to those before them, nats a token: ``sites`` of the worst blocks only,
    ``groups`` all of them; by path and by group."""

    sites: dict[str, float]
    groups: dict[str, float]


def chain(
    lab: Lab,
    sites: Sequence[SimulatedSite],
    wanted: Iterable[SimulatedSite],
    remember: Remember,
) -> Iterator[tuple[SimulatedSite, float]]:
    """Each wanted site with the loss while all ``sites`` up to it, and it, are quantized."""
    chosen = {each.path for each in wanted}
    cuts = lab.start()
    for index, each in enumerate(sites):
        if each.path in chosen:
            cuts = lab.advance(cuts, each.node, setting(sites[:index]))
            under = setting(sites[: index + 1])
            yield each, remember(each.path, partial(lab.loss, under, cuts))


def steps(
    lab: Lab,
    sites: Sequence[SimulatedSite],
    group_of: Mapping[str, str],
    loss_float: float,
    remember: Remember,
    over: Over,
) -> Steps:
    """The chain's steps by group, and by site in the groups that add most.

    As many groups as ALLOWANCE allows, at least one. ``group_of`` by path; ``remember(path,
    compute)`` keeps finished losses, by the names that in_order of every site uses; ``over`` shows
    progress over so many losses.
    """
    order = sorted(sites, key=lambda each: lab.position(each.node))
    runs = contiguous(order, group_of)
    ends = [run[-1] for run in runs]
    losses = {each.path: loss for each, loss in over(chain(lab, order, ends, remember), len(ends))}
    before = [loss_float, *(losses[each.path] for each in ends)]
    added = [losses[end.path] - before[index] for index, end in enumerate(ends)]
    inner = _worst(lab, runs, added)
    losses |= {
        each.path: loss for each, loss in over(chain(lab, order, inner, remember), len(inner))
    }
    groups: dict[str, float] = {}
    for run, value in zip(runs, added, strict=True):
        name = group_of[run[0].path]
        groups[name] = groups.get(name, 0.0) + value
    return Steps(_by_site(order, losses, loss_float), groups)


def contiguous(
    order: Sequence[SimulatedSite], group_of: Mapping[str, str]
) -> list[list[SimulatedSite]]:
    """The sites in graph order, divided where the group changes."""
    runs: list[list[SimulatedSite]] = []
    for each in order:
        if runs and group_of[runs[-1][0].path] == group_of[each.path]:
            runs[-1].append(each)
        else:
            runs.append([each])
    return runs


def _worst(
    lab: Lab, runs: Sequence[list[SimulatedSite]], added: Sequence[float]
) -> list[SimulatedSite]:
    """The sites, but for the last, of the runs that add most: their losses are still to be found.

    Runs of one site have their figure already, and cost nothing.
    """
    chosen: list[SimulatedSite] = []
    spent = 0.0
    for index in sorted(range(len(runs)), key=lambda i: -added[i]):
        inner = runs[index][:-1]
        cost = sum(lab.share_behind(each.node) for each in inner)
        if chosen and spent + cost > ALLOWANCE:
            continue  # a smaller block may still fit
        chosen, spent = [*chosen, *inner], spent + cost
    return chosen


def _by_site(
    order: Sequence[SimulatedSite], losses: Mapping[str, float], loss_float: float
) -> dict[str, float]:
    """The step at every site before and behind which the loss is known."""
    found: dict[str, float] = {}
    before: float | None = loss_float
    for each in order:
        after = losses.get(each.path)
        if before is not None and after is not None:
            found[each.path] = after - before
        before = after
    return found
