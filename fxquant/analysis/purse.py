"""The time that an analysis may take before it starts nothing more that it can leave out."""

from __future__ import annotations

import math
import time


class Purse:
    """``seconds`` from now on; infinite where nothing is to be left out."""

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds = seconds
        self._started = time.monotonic()

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self._started)

    def holds(self, seconds: float) -> bool:
        """Whether what is expected to take so long may start."""
        return seconds <= self.left
