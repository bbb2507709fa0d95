"""The parts of a quantization error, and an input with some of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Literal, get_args

from torch import Tensor

from fxquant.numerics.quantizer import Quantizer, Split

Cause = Literal["weights", "clipping", "rounding", "scale"]
EVERY_CAUSE: tuple[Cause, ...] = get_args(Cause)
CAUSES: tuple[Cause, ...] = EVERY_CAUSE[:3]  # those that are listed even where they are 0
Parts = frozenset[Cause]
EVERY_PART: Parts = frozenset(EVERY_CAUSE)


def subsets(causes: Iterable[Cause]) -> list[Parts]:
    """Every subset, the empty one first, each after all that it contains."""
    listed = list(causes)
    return [
        frozenset(chosen)
        for size in range(len(listed) + 1)
        for chosen in itertools.combinations(listed, size)
    ]


def ordered(causes: Iterable[Cause]) -> tuple[Cause, ...]:
    """In their usual order."""
    return tuple(sorted(causes, key=EVERY_CAUSE.index))


def no_figures(causes: Iterable[Cause]) -> dict[Cause, float]:
    """0 for each cause that is always listed, and for each of ``causes``."""
    return dict.fromkeys((*CAUSES, *(cause for cause in causes if cause not in CAUSES)), 0.0)


def with_parts(quantizer: Quantizer, x: Tensor, parts: Parts) -> Tensor:
    """x with the clipping error, the rounding error, both or none.

    Without "scale", steps are those of scales that are not rounded themselves; what is clipped is
    what the stored ones clip.
    """
    if not parts & {"clipping", "rounding"}:
        return x
    if {"clipping", "rounding"} <= parts and ("scale" in parts or not quantizer.rounds_scale):
        return quantizer(x)
    return combined(x, quantizer.split(x), parts)


def combined(x: Tensor, split: Split, parts: Parts) -> Tensor:
    """The same of an x that is split already."""
    if "rounding" not in parts:
        return split.clipped if "clipping" in parts else x
    coded = split.rounded if "scale" in parts else split.exact
    return coded if "clipping" in parts else x + (coded - split.clipped)
