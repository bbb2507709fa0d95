"""What is said before an explanation starts: what is run, what it costs, what is left out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxquant.analysis.prediction import Step
from fxquant.analysis.progress import Progress, clock
from fxquant.ir.counted import counted
from fxquant.recipes.repairs import REPAIRS
from fxquant.schemes.scheme import Scheme

# What there is to run, in the order in which it is listed as left out.
OFFERED = ("in_order", "causes", "causes:kinds", "rescue", "path", "alone", "first_order")
WHAT = {
    "in_order": "in_order at every site",
    "in_order:worst": "in_order by block, and by site in the worst blocks",
    "in_order:kinds": "in_order by kind of site",
    "causes": "causes of the model and of the worst sites",
    "causes:kinds": "causes of each kind of site",
    "rescue": "rescue at every site",
    "alone": "alone at every site",
    "path": "path",
    "first_order": "first_order",
}
HOW = '--methods METHOD ..., or --full; in Python methods=(...), or "full"'


def announce(
    progress: Progress,
    scheme: Scheme,
    steps: Sequence[Step],
    forward_seconds: float,
    methods: Sequence[str],
    windows: Sequence[Tensor],
    limit: float,
) -> None:
    """Say it, where progress is shown; ``limit``: seconds after which parts are left out."""
    count = sum(len(ids) for ids in windows)
    length = max(ids.shape[1] for ids in windows)
    forwards = sum(step.forwards for step in steps)
    seconds = sum(step.seconds(forward_seconds) for step in steps)
    where = f"{counted(count, 'window')} of {length} tokens"
    progress.say(f"{scheme} on {where}: {run_text(methods)}")
    own = [name for name, _ in scheme.repairs if REPAIRS[name].needs_calibration]
    beside = f", and what {', '.join(own)} takes" if own else ""
    most = f"at most {forwards:.0f} forwards of all windows, {forward_seconds:.2g} s each"
    if seconds <= limit:
        progress.say(f"{most}: about {clock(seconds)}{beside}")
    else:
        least = max(limit, least_seconds(steps, forward_seconds))
        progress.say(
            f"{most}, about {clock(seconds)}; what can be left out is not started after "
            f"{clock(limit)}: about {clock(least)}{beside}"
        )
    progress.say(f"not run: {left_out(methods)}")


def least_seconds(steps: Sequence[Step], forward_seconds: float) -> float:
    """What cannot be left out is expected to take."""
    return sum(step.least_seconds(forward_seconds) for step in steps)


def run_text(methods: Sequence[str]) -> str:
    """The methods in words."""
    return "; ".join(WHAT.get(method, method) for method in methods) or "local figures"


def left_out(methods: Sequence[str]) -> str:
    """Which methods are not run, and how to ask for them."""
    missing = [method for method in OFFERED if method not in methods]
    return f"{', '.join(missing)} ({HOW})" if missing else "nothing, every method is"
