"""in_order where it counts: block by block, then site by site within the worst blocks.

Both are cuts of one chain of losses, of which in_order is the steps: everything up to a site is
quantized, the rest is float. So the figures are those of in_order, and still sum to L(all) -
L(float): the sites of the opened blocks, and the other blocks as a whole.

What a block adds is the sum of what its sites add, and these may cancel, so that it bounds none of
them. Blocks are opened until none that is closed adds as much as the last of the sites asked for:
a site behind that would have to be hidden by others of its block that lower the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fxquant.analysis.effects import Remember
from fxquant.analysis.lab import Lab, setting
from fxquant.analysis.sites import SimulatedSite

ALLOWANCE = 20.0  # forwards that opening blocks may cost together
Losses = Iterable[tuple[SimulatedSite, float]]
Over = Callable[[Losses, int, float], Losses]


@dataclass(frozen=True)
class Steps:
    """What sites add to those before them, nats a token: ``sites`` of the opened blocks only,
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
    wanted: int,
    allowance: float,
) -> Steps:
    """The chain's steps by group, and by site in the groups that add most.

    ``wanted``: groups are opened until so many sites are settled, as far as ``allowance``, in
    forwards, goes; at least one. ``group_of`` by path;
    ``remember(path, compute)`` keeps finished losses, by the names that in_order of every site
    uses; ``over(losses, count, forwards)`` shows progress.
    """
    order = sorted(sites, key=lambda each: lab.position(each.node))
    runs = contiguous(order, group_of)
    ends = [run[-1] for run in runs]
    found = over(chain(lab, order, ends, remember), len(ends), ends_cost(map(_behind(lab), ends)))
    losses = {each.path: loss for each, loss in found}
    before = [loss_float, *(losses[each.path] for each in ends)]
    added = [losses[end.path] - before[index] for index, end in enumerate(ends)]
    left, opened = allowance, False
    for index in sorted(range(len(runs)), key=lambda i: -added[i]):
        inner = runs[index][:-1]
        if not inner:
            continue  # a run of one site has its figure already
        if opened and added[index] <= _last_of(wanted, _by_site(order, losses, loss_float)):
            break
        cost = opening_cost(list(map(_behind(lab), inner)))
        if opened and cost > left:
            continue  # a smaller block may still fit
        left, opened = left - cost, True
        found = over(chain(lab, order, inner, remember), len(inner), cost)
        losses |= {each.path: loss for each, loss in found}
    groups: dict[str, float] = {}
    for run, value in zip(runs, added, strict=True):
        name = group_of[run[0].path]
        groups[name] = groups.get(name, 0.0) + value
    return Steps(_by_site(order, losses, loss_float), groups)


def ends_cost(behind: Iterable[float]) -> float:
    """Forwards of the losses at sites with these shares of the graph behind them, in one walk."""
    return 1 + sum(behind)


def opening_cost(behind: Sequence[float]) -> float:
    """Forwards of opening a block whose sites but the last have these shares behind them."""
    return 1 - behind[-1] + sum(behind)


def _behind(lab: Lab) -> Callable[[SimulatedSite], float]:
    return lambda each: lab.share_behind(each.node)


def _last_of(wanted: int, sites: Mapping[str, float]) -> float:
    """The smallest of the ``wanted`` largest figures; -inf for fewer figures."""
    largest = sorted(sites.values(), reverse=True)[:wanted]
    return largest[-1] if len(largest) == wanted else -math.inf


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
