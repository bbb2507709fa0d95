"""What each method of an analysis cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

BACKWARD = 2  # a backward pass counts as so many forwards, as is usual: an assumption


@dataclass
class Cost:
    """What one method cost: ``forwards``, the share of the graph's nodes that were run, summed over
    windows and divided by their number, a backward pass as BACKWARD of them; wall seconds.

    ``partial``: losses of an earlier run that did not keep their cost are left out.
    """

    forwards: float = 0.0
    seconds: float = 0.0
    partial: bool = False


@dataclass
class Meter:
    """Adds up the cost of each method."""

    costs: dict[str, Cost] = field(default_factory=dict)
    current: str = "other"

    @property
    def now(self) -> Cost:
        """The cost so far of the method that is being measured."""
        return self.costs.setdefault(self.current, Cost())

    @contextmanager
    def measuring(self, method: str) -> Iterator[None]:
        before, self.current = self.current, method
        started = time.perf_counter()
        try:
            yield
        finally:
            self.now.seconds += time.perf_counter() - started
            self.current = before

    def count(self, forwards: float) -> None:
        self.now.forwards += forwards

    def restore(self, cost: Cost | None) -> None:
        """Add what a loss cost in an earlier run; None: not known."""
        if cost is None:
            self.now.partial = True
        else:
            self.now.forwards += cost.forwards
            self.now.seconds += cost.seconds
