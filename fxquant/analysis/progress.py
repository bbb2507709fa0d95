"""Progress of a long analysis: bars on a terminal, elsewhere plain lines with the time left."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from tqdm import tqdm

EVERY = 5.0  # seconds between plain lines, at least
T = TypeVar("T")
Advance = Callable[[], object]


class Progress:
    """What there is to see while an analysis runs, on stderr.

    Args:
        shown: True; False for nothing; None for a terminal alone.
        expected: seconds that each step is expected to take, by its name.
        name: of the analysis, in front of plain lines.
        most: seconds that all steps take together at most, where some may be left out.
    """

    def __init__(
        self,
        shown: bool | None,
        expected: Mapping[str, float] | None = None,
        name: str = "explain",
        most: float = math.inf,
    ) -> None:
        terminal = sys.stderr.isatty()
        self.shown = terminal if shown is None else shown
        self._bars = self.shown and terminal
        self._expected = dict(expected or {})
        self._name = name
        self._whole = min(sum(self._expected.values()), most)
        self._started = time.monotonic()
        self._done = 0.0  # of the expected seconds
        self._last: float | None = None

    def say(self, text: str) -> None:
        if self.shown:
            print(f"{self._name}: {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def step(self, name: str, total: int, seconds: float | None = None) -> Iterator[Advance]:
        """``total`` parts of the step ``name``; call what is yielded after each of them.

        ``seconds``: what these parts are expected to take, if not all that the step is.
        """
        if self._bars:
            with tqdm(total=total, desc=name, leave=False) as bar:
                yield bar.update
            return
        before, count = self._done, 0
        seconds = self._expected.get(name, 0.0) if seconds is None else seconds

        def advance() -> None:
            nonlocal count
            count += 1
            self._done = before + seconds * count / max(total, 1)
            self._line(f"{name} {count} of {total}")

        yield advance
        self._done = before + seconds

    def over(
        self, items: Iterable[T], name: str, total: int, seconds: float | None = None
    ) -> Iterator[T]:
        """The items, each an advance of the step."""
        with self.step(name, total, seconds) as advance:
            for item in items:
                yield item
                advance()

    def _line(self, text: str) -> None:
        now = time.monotonic()
        if self.shown and (self._last is None or now - self._last >= EVERY):
            self._last = now
            self.say(f"{text}, {self._left(now)}")

    def _left(self, now: float) -> str:
        """From the expected times, at the pace of what is done."""
        passed, whole = now - self._started, self._whole
        left = max(whole - self._done, 0.0)
        if self._done > 0.1 * whole > 0:
            left *= passed / self._done
        return f"{clock(passed)} passed, about {clock(left)} left"


def clock(seconds: float) -> str:
    """``48 s``, ``3 min 05 s``, ``2 h 04 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
