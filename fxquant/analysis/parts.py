"""The parts of a quantization error, and an input with some of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Literal, get_args

from torch import Tensor

from fxquant.numerics.quantizer import Quantizer

Cause = Literal["weights", "clipping", "rounding"]
CAUSES: tuple[Cause, ...] = get_args(Cause)
Parts = frozenset[Cause]
EVERY_PART: Parts = frozenset(CAUSES)


def subsets(causes: Iterable[Cause]) -> list[Parts]:
    """Every subset, the empty one first, each after all that it contains."""
    listed = list(causes)
    return [
        frozenset(chosen)
        for size in range(len(listed) + 1)
        for chosen in itertools.combinations(listed, size)
    ]


def with_parts(quantizer: Quantizer, x: Tensor, parts: Parts) -> Tensor:
    """x with the clipping error, the rounding error, both or none."""
    if "clipping" in parts and "rounding" in parts:
        return quantizer(x)
    if not parts & {"clipping", "rounding"}:
        return x
    split = quantizer.split(x)
    return split.clipped if "clipping" in parts else x + (split.rounded - split.clipped)
