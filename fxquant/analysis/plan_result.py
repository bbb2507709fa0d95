"""What plan finds, and on what it was found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.analysis.costs import IN_WORDS
from fxquant.ir.counted import counted
from fxquant.run.loss import standard_error, window_losses
from fxquant.schemes.scheme import Scheme


@dataclass(frozen=True)
class Measured:
    """A loss difference on some windows, nats a token; ``error``: its standard error over the
    windows, None where there is only one; ``windows``: how many."""

    delta: float
    error: float | None
    windows: int

    def __str__(self) -> str:
        error = "n/a" if self.error is None else f"{self.error:.4f}"
        return f"{self.delta:+.4f} ± {error} s.e. on {counted(self.windows, 'window')}"


@dataclass(frozen=True)
class Everywhere:
    """One choice at every site: its mean ``cost`` a weight and its loss difference, simulated."""

    choice: str
    cost: float
    delta_loss: float

    def __str__(self) -> str:
        return f"{self.choice} {self.delta_loss:+.4f} at {self.cost:.2f}"


@dataclass(frozen=True)
class Plan:
    """A planned scheme: ``delta_loss`` of the converted model and of all sites at the cheapest
    choice, ``cost`` as a mean over weights, how many forwards were run and plans verified.

    ``budget``: the largest loss difference that was allowed, or ``bits`` the largest cost; the
    other is None. ``everywhere``: under a budget of bits, each single choice that keeps it.

    ``chosen_on``: delta_loss with its standard error, on the windows that it was chosen on;
    ``held_out``: the same on windows that had no part in it, None where none were given.
    """

    scheme: Scheme
    budget: float | None
    delta_loss: float
    cheapest_delta_loss: float
    cost: float
    cost_name: str
    counts: dict[str, int]
    forwards: float
    verifications: int
    chosen_on: Measured
    held_out: Measured | None = None
    bits: float | None = None
    everywhere: tuple[Everywhere, ...] = ()

    def __str__(self) -> str:
        most_loss = "" if self.budget is None else f", of at most {self.budget:+.4f}"
        most_bits = "" if self.bits is None else f" with scales, of at most {self.bits:g}"
        lines = [
            spelled(self.counts),
            f"Δloss {self.chosen_on} that it was chosen on, verified{most_loss} "
            f"({self.cheapest_delta_loss:+.4f} with every site at the cheapest choice); "
            f"{self.cost:.2f} {IN_WORDS[self.cost_name]}{most_bits}; {self.forwards:.0f} forwards "
            f"of all windows to choose it, {counted(self.verifications, 'plan')} verified",
        ]
        if self.everywhere:
            lines.append(f"one choice everywhere: {', '.join(map(str, self.everywhere))}")
        if self.held_out is not None:
            lines.append(f"Δloss {self.held_out} that had no part in choosing it{self._over()}")
        else:
            lines.append(
                "not measured on windows that had no part in choosing it, where it is larger as a "
                "rule: the choice fits the windows that it was made on"
            )
        return "\n".join([*lines, *self._warning()])

    def _over(self) -> str:
        assert self.held_out is not None
        over = 0.0 if self.budget is None else self.held_out.delta - self.budget
        return f", {over:.4f} above the budget" if over > 0 else ""

    def _warning(self) -> list[str]:
        error = self.chosen_on.error
        if error is None:
            return ["one window gives no standard error: how far this holds elsewhere is not known"]
        if self.budget is None or self.budget - self.delta_loss >= error:
            return []
        return [
            f"the budget is within one standard error of this Δloss ({error:.4f}): on other text "
            "it may well be missed; more windows, or a smaller budget, make it safer"
        ]


def spelled(counts: dict[str, int]) -> str:
    """``3 sites w8, 2 sites fp``."""
    return ", ".join(f"{counted(count, 'site')} {choice}" for choice, count in counts.items())


class Reference:
    """The float model's losses on some windows, to measure converted graphs against."""

    def __init__(self, graph: GraphModule, windows: Sequence[Tensor]) -> None:
        self.windows = windows
        self._losses = _losses(graph, windows)

    def measure(self, converted: GraphModule) -> Measured:
        """The loss difference of a converted graph, integers and all, by one loss function."""
        ours = _losses(converted, self.windows)
        pairs = zip(ours, self._losses, strict=True)
        sums = [(a.to(torch.float64) - b.to(torch.float64)).sum() for a, b in pairs]
        differences = torch.stack(sums).tolist()  # one read: each waits for the device
        counts = [each.numel() for each in ours]
        delta = math.fsum(differences) / sum(counts)
        return Measured(delta, standard_error(differences, counts), len(counts))


def _losses(graph: GraphModule, windows: Sequence[Tensor]) -> list[Tensor]:
    """Token losses by row of every window; each window [b, L] is run by itself."""
    found: list[Tensor] = []
    for ids in windows:
        for part in window_losses(lambda each: graph(input_ids=each), ids, len(ids)):
            found += part.unbind()
    return found
