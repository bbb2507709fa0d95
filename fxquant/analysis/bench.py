"""What every measurement of one run shares: the lab, the sites, what is kept and what is said."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fxquant.analysis.effects import Remember
from fxquant.analysis.lab import Cuts, Lab, setting
from fxquant.analysis.progress import Advance, Progress
from fxquant.analysis.purse import Purse
from fxquant.analysis.sites import SimulatedSite
from fxquant.analysis.store import Store


@dataclass
class Bench:
    """One run's material. ``forward_seconds``: what a float forward over all windows takes;
    ``batches``: what was calibrated on, of ``calibration_tokens``; ``notes``: said at the end of
    the report."""

    lab: Lab
    sites: tuple[SimulatedSite, ...]
    batches: Iterable[dict[str, Tensor]] | None
    calibration_tokens: int
    store: Store
    progress: Progress
    purse: Purse
    forward_seconds: float
    notes: list[str]

    def remember(self, prefix: str) -> Remember:
        """Keeps finished losses under names that begin so."""
        meter = self.lab.meter
        return lambda name, compute: self.store.remember(f"{prefix} {name}", compute, meter)

    def without(self, site: SimulatedSite, cuts: Cuts) -> float:
        """The loss with one site in float: of its rescue, its causes and its first other choice."""
        under = setting(each for each in self.sites if each is not site)
        return self.remember("rescue")(site.path, partial(self.lab.loss, under, cuts))

    def windows(self, name: str) -> AbstractContextManager[Advance]:
        """A step over the windows."""
        return self.progress.step(name, len(self.lab.windows))
