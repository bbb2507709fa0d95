"""How far cheap figures can be trusted: each held against the exact effects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """A figure against an exact effect over the sites.

    ``rank_correlation``: Spearman's, ties averaged; nan where either is constant. ``top``: share of
    the exact effect's eight largest sites that are among the figure's eight largest. ``error``: sum
    of |figure - effect| over sum of |effect|; None for figures that are not in nats. ``sites``: how
    many were compared, those for which there are both.
    """

    figure: str
    against: str
    rank_correlation: float
    top: float
    error: float | None
    sites: int


def agreement(
    figure: str,
    values: Mapping[str, float],
    against: str,
    effects: Mapping[str, float],
    *,
    in_nats: bool,
) -> Agreement:
    """Compare two figures of the same sites."""
    paths = [path for path in effects if path in values]
    a = torch.tensor([values[path] for path in paths], dtype=torch.float64)
    b = torch.tensor([effects[path] for path in paths], dtype=torch.float64)
    count = min(8, len(paths))
    common = set(a.topk(count).indices.tolist()) & set(b.topk(count).indices.tolist())
    size = float(b.abs().sum())
    error = float((a - b).abs().sum()) / size if in_nats and size else None
    top = len(common) / count if count else math.nan
    return Agreement(figure, against, spearman(a, b), top, error, len(paths))


def shared_draw(rescues: Mapping[str, float], delta_loss: float) -> str | None:
    """What there is to say when the rescues measure redrawn rounding noise; None if they do not.

    Every rescue is L(all) minus a trial in which the rounding errors after the site fall anew. If
    L(all) is one draw of a noisy loss, its distance from the usual draw stands in every rescue: the
    median site would then give back more than its part of the whole loss difference.
    """
    typical = median(rescues.values())
    if abs(typical) * len(rescues) <= 1.5 * abs(delta_loss):
        return None
    return (
        f"rescue is unreliable here: {len(rescues)} sites give {sum(rescues.values()):+.4f} "
        f"together against Δloss {delta_loss:+.4f}, and even the median site {typical:+.4f}. All "
        "share the one draw of rounding noise of the fully quantized model, and every trial draws "
        "it anew after its site; in_order and alone tell sites apart"
    )


def spearman(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of the ranks of two vectors."""
    ranks = [_ranks(values) for values in (a, b)]
    centred = [r - r.mean() for r in ranks]
    norm = float(centred[0].norm() * centred[1].norm())
    return float(centred[0] @ centred[1]) / norm if norm else math.nan


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values share the mean of theirs."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0) - 1
    mean = last.to(torch.float64) - (counts.to(torch.float64) - 1) / 2
    ranks: Tensor = mean[inverse]
    return ranks
