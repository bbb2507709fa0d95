"""Which causes a table or a picture of causes has a place for."""

from __future__ import annotations

from collections.abc import Iterable

from fxquant.analysis.parts import EVERY_CAUSE, no_figures


def causes_found(causes: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """The names in any of ``causes``, and those always listed, in their usual order.

    So rows of MX or NVFP4, whose scales are rounded, bring the cause `scale` along.
    """
    names = {name for each in causes for name in each}
    return tuple(no_figures(cause for cause in EVERY_CAUSE if cause in names))
