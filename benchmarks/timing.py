"""Times of steps that alternate, so that a slow spell of the machine hits all of them.

On one thread CPU seconds are counted: what else runs on the machine costs less of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Step = Callable[[], object]


def clock() -> str:
    """What is counted: "CPU" or "wall"."""
    return "CPU" if torch.get_num_threads() == 1 else "wall"


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each step over ``rounds`` rounds, after one round to warm up."""
    now = time.process_time if clock() == "CPU" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, step in steps.items():
            started = now()
            step()
            if index:
                seconds[name].append(now() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios_to(base: str, steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Each step against ``base`` alone, A B A B: other candidates would empty the caches."""
    found: dict[str, float] = {}
    for name, step in steps.items():
        if name != base:
            pair = interleaved({base: steps[base], name: step}, rounds)
            found[name] = pair[name] / pair[base]
    return found
