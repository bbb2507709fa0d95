"""What a plan is going to cost, said before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from fxquant.analysis.budget import Budget
from fxquant.analysis.lab import Lab
from fxquant.analysis.prediction import seconds_of
from fxquant.analysis.progress import Progress, clock
from fxquant.ir.counted import counted
from fxquant.ir.graph import Site, site_outputs
from fxquant.schemes.specs import FLOAT, SiteSpec

SITES, PLANS = "sites", "plans"


def plan_forwards(
    lab: Lab, sites: Sequence[Site], specs: Mapping[str, SiteSpec], budget: Budget
) -> dict[str, float]:
    """Forwards of measuring each choice at each site alone, and of some plans, by step.

    How many plans a budget of loss takes is not known: as many as where a plan is found at once.
    """
    paths = {site.path for site in sites}
    behind = [lab.share_behind(n) for site, n in site_outputs(lab.gm) if site.path in paths]
    choices = [spec for spec in specs.values() if spec != FLOAT]
    upgrades = len(sites) * (len(specs) - 1)
    plans = plans_of(upgrades) if budget.bits is None else 2 + len(specs)
    return {SITES: 1 + len(choices) * sum(behind), PLANS: float(plans)}


def plans_of(upgrades: int) -> int:
    """How many plans a search measures where losses fall: doubling, then halving."""
    return 2 * math.ceil(math.log2(upgrades + 2))


def announce_plan(
    progress: Progress,
    budget: Budget,
    specs: Mapping[str, SiteSpec],
    sites: int,
    windows: Sequence[Tensor],
    forwards: Mapping[str, float],
    forward_seconds: float,
) -> None:
    """Say it, where progress is shown."""
    count, length = sum(map(len, windows)), max(ids.shape[1] for ids in windows)
    progress.say(
        f"a budget of {budget} on {counted(count, 'window')} of {length} "
        f"tokens: {', '.join(specs)} at each of {counted(sites, 'site')} alone, then all together"
    )
    seconds = sum(seconds_of(name, each, forward_seconds) for name, each in forwards.items())
    more = ", more where the first plans miss the budget" if budget.bits is None else ""
    progress.say(
        f"about {sum(forwards.values()):.0f} forwards of all windows, {forward_seconds:.2g} s "
        f"each: about {clock(seconds)}{more}"
    )
