"""What a plan has to keep: a difference of loss, or bits a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxquant.analysis.costs import COSTS, IN_WORDS
from fxquant.errors import SchemeError


@dataclass(frozen=True)
class Budget:
    """``loss``: the largest loss difference, nats a token, or ``bits``: the largest ``cost`` a
    weight, mean of all; the other is None. ``cost``: a name of COSTS."""

    loss: float | None
    bits: float | None
    cost: str

    def __str__(self) -> str:
        if self.bits is None:
            return f"{self.loss:+.4f}"
        return f"{self.bits:g} {IN_WORDS[self.cost]}"


def as_budget(loss: float | None, bits: float | None, cost: str | None) -> Budget:
    """One of the two; SchemeError where both or none are given, or what they say cannot be kept.

    ``cost`` None: what is stored under a budget of bits, both operands' bits under one of loss.
    """
    if (loss is None) == (bits is None):
        given = "both" if bits is not None else "none"
        raise SchemeError(
            "a plan keeps either budget=, a loss difference in nats a token, or bits=, those of a "
            f"weight; {given} of them given"
        )
    cost = cost or ("bits" if bits is None else "storage")
    if cost not in COSTS:
        raise SchemeError(f"unknown cost {cost!r}: known are {', '.join(COSTS)}")
    if loss is not None and not 0 <= loss < math.inf:
        raise SchemeError(f"the budget is a finite loss difference of at least 0, got {loss}")
    if bits is not None and not 0 < bits < math.inf:
        raise SchemeError(f"bits is a finite number of bits above 0, got {bits}")
    return Budget(loss, bits, cost)
