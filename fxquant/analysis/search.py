"""How far to go along a row of states whose losses are measured one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator


def candidates(
    delta: Callable[[int], float], simulated: dict[int, float], last: int, budget: float
) -> Iterator[int]:
    """Numbers of upgrades to verify: those whose simulation keeps the budget, from few to many,
    then the one that came nearest to it."""
    tried: set[int] = set()
    count = fewest(delta, 0, last, budget)
    while count is not None:
        tried.add(count)
        yield count
        count = fewest(delta, count + 1, last, budget)
    best = min(simulated, key=lambda each: simulated[each])
    if best not in tried:
        yield best


def fewest(delta: Callable[[int], float], first: int, last: int, budget: float) -> int | None:
    """The fewest steps in [first, last] found whose ``delta`` keeps ``budget``; None if none is.

    Steps that double until the budget holds, then bisection between the last two. If not even
    ``last`` keeps it (the dearest state need not be the best), the gaps beside the best state are
    halved until one does. Exact where ``delta`` falls monotonically; elsewhere a state between two
    that were measured may be missed.
    """
    tried: dict[int, float] = {}

    def holds(count: int) -> bool:
        tried[count] = delta(count)
        return tried[count] <= budget

    found = next(filter(holds, _doubling(first, last)), None)
    if found is None:
        found = _beside_the_best(tried, holds)
    if found is None:
        return None
    low = max((count for count in tried if count < found), default=first - 1) + 1
    while low < found:
        middle = (low + found) // 2
        if holds(middle):
            found = middle
        else:
            low = middle + 1
    return found


def _doubling(first: int, last: int) -> Iterator[int]:
    step = 1
    while first < last:
        yield first
        first, step = first + step, step * 2
    if step > 1 or first == last:
        yield last


def _beside_the_best(tried: dict[int, float], holds: Callable[[int], bool]) -> int | None:
    while tried:
        known = sorted(tried)
        best = known.index(min(known, key=lambda count: tried[count]))
        beside = itertools.pairwise(known[max(best - 1, 0) : best + 2])
        middles = sorted({(a + b) // 2 for a, b in beside} - tried.keys())
        if not middles:
            return None
        found = next(filter(holds, middles), None)
        if found is not None:
            return found
    return None
