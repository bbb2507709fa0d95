"""path: the effect of every site, cause, token and channel at once, by an integral of gradients.

All errors are blended in together, y_s = x W^T + alpha e_s with e_s frozen as the quantized model
makes it, from the float model (alpha 0) to the quantized one (alpha 1). Then

    L(1) - L(0) = sum over s of <integral of dL/dy_s over alpha, e_s>

(Sundararajan et al., "Axiomatic Attribution for Deep Networks", 2017, section 3, here along the
errors). Because e_s is frozen, the integrated gradient alone splits every way that e_s does. The
integral is a Gauss-Legendre sum, and counts only when it meets the measured loss difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fxquant.analysis.lab import FLOAT_SETTING, Lab, Setting
from fxquant.analysis.meter import BACKWARD
from fxquant.analysis.parts import EVERY_PART, Cause, no_figures
from fxquant.analysis.sites import LinearSite, SimulatedSite
from fxquant.run.execution import Cut

POINTS = (4, 8)  # tried in turn; each costs a forward and a backward pass
EVEN = 0.5  # nats a token; beyond, fewer points than the most have not been seen to suffice
TOLERANCE = 0.05  # of the loss difference that the sum may miss
SMALLEST = 0.002  # nats a token that it may miss in any case
# At most, by nodes: 6 for the errors and their parts, then a forward and a backward pass a point.
MOST_FORWARDS = {"path": 6.0 + (1 + BACKWARD) * sum(POINTS), "first_order": 3.0 + 1 + BACKWARD}
Gradients = dict[str, Tensor]


def gauss_legendre(points: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of the Gauss-Legendre rule on [0, 1] (Golub and Welsch 1969)."""
    k = torch.arange(1, points, dtype=torch.float64)
    beta = k / (4 * k.square() - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return ((values + 1) / 2).tolist(), vectors[0].square().tolist()


@dataclass
class PathSite:
    """One site's share of the integral, nats a token.

    ``causes`` by part; ``tokens``: for each window [b * L]; ``channels`` [K] by input channel, of
    all of them.
    """

    causes: dict[Cause, float]
    tokens: list[Tensor] = field(default_factory=list)
    channels: Tensor | None = None

    @property
    def total(self) -> float:
        return sum(self.causes.values())


@dataclass(frozen=True)
class PathResult:
    """The integral over all windows.

    ``estimate`` is its sum, ``residual`` the measured difference minus it, ``missed`` the sum of
    every window's |residual|, ``points`` the most that a window needed. ``refused`` says why the
    figures do not count, None if they do.
    """

    sites: dict[str, PathSite]
    estimate: float
    residual: float
    missed: float
    points: int
    refused: str | None


def integrate(
    lab: Lab, sites: Sequence[SimulatedSite], advance: Callable[[], object] = lambda: None
) -> PathResult:
    """The integrated attribution; each window takes as many points as it needs.

    ``advance`` is called after each window. Memory: two tensors the size of every site's output
    for one window. Cost: a forward and a backward pass a point, and some 6 forwards for the errors
    and their parts, which are counted as if every node were a linear's.
    """
    found = {each.path: PathSite(no_figures(each.causes)) for each in sites}
    estimate, difference, missed, most = 0.0, 0.0, 0.0, 0
    for cut, ids in zip(lab.start(), lab.windows, strict=True):
        errors, change = _frozen_errors(lab, sites, cut, ids)
        share = ids.shape[0] * (ids.shape[1] - 1) / lab.tokens
        for points in POINTS if abs(change) <= EVEN * share else POINTS[-1:]:
            gradients = _blended(lab, sites, cut, ids, errors, gauss_legendre(points))
            total = sum(_dot(gradients[path], errors[path]) for path in errors)
            most = max(most, points)
            if abs(total - change) <= 0.2 * max(TOLERANCE * abs(change), SMALLEST * share):
                break
        estimate, difference = estimate + total, difference + change
        missed += abs(total - change)
        _split(lab, sites, cut, ids, gradients, found)
        advance()
    residual = difference - estimate
    refused = _refusal(difference, estimate, missed, most)
    return PathResult(found, estimate, residual, missed, most, refused)


def first_order(lab: Lab, sites: Sequence[SimulatedSite]) -> dict[str, float]:
    """<dL/dy_s of the float model, e_s> by site: what one backward pass predicts."""
    found = {each.path: 0.0 for each in sites}
    for cut, ids in zip(lab.start(), lab.windows, strict=True):
        errors, _ = _frozen_errors(lab, sites, cut, ids)
        gradients = _blended(lab, sites, cut, ids, errors, ([0.0], [1.0]))
        for path, error in errors.items():
            found[path] += _dot(gradients[path], error)
    return found


def _refusal(difference: float, estimate: float, missed: float, points: int) -> str | None:
    allowed = max(TOLERANCE * abs(difference), SMALLEST)
    if math.isfinite(missed) and missed <= allowed:
        return None
    return (
        f"the integral has not converged with {points} points: it gives {estimate:+.4f} for a "
        f"measured {difference:+.4f}, and its windows miss {missed:.4f} together (at most "
        f"{allowed:.4f} is accepted); the errors are too large to be blended in evenly"
    )


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.to(torch.float64) * b.to(torch.float64)).sum())


@torch.no_grad()
def _frozen_errors(
    lab: Lab, sites: Sequence[SimulatedSite], cut: Cut, ids: Tensor
) -> tuple[dict[str, Tensor], float]:
    """e_s = ŷ - y at every site of the quantized model, and the window's loss difference."""
    errors: dict[str, Tensor] = {}

    def recording(site: SimulatedSite, *operands: Tensor) -> Tensor:
        y = site.output(EVERY_PART & frozenset(site.causes), *operands)
        errors[site.path] = y - site.output(frozenset(), *operands)
        return y

    under = {each.node: partial(recording, each) for each in sites}
    quantized = lab.nll(cut, ids, under).to(torch.float64).sum()
    change = quantized - lab.nll(cut, ids, FLOAT_SETTING).to(torch.float64).sum()
    lab.meter.count(3 / len(lab.windows))
    return errors, float(change) / lab.tokens


@torch.enable_grad()
def _blended(
    lab: Lab,
    sites: Sequence[SimulatedSite],
    cut: Cut,
    ids: Tensor,
    errors: Mapping[str, Tensor],
    rule: tuple[list[float], list[float]],
) -> Gradients:
    """sum_i w_i dL/dy_s at alpha_i, for every site: the loss of one window over all tokens."""
    summed: Gradients = {}
    for alpha, weight in zip(*rule, strict=True):
        added = {path: (alpha * error).requires_grad_() for path, error in errors.items()}
        under: Setting = {
            each.node: lambda *x, each=each: each.output(frozenset(), *x) + added[each.path]  # noqa: B023
            for each in sites
        }
        loss = lab.nll(cut, ids, under).sum() / lab.tokens
        gradients = torch.autograd.grad(loss, list(added.values()))
        for path, gradient in zip(added, gradients, strict=True):
            # Not in place: an addition hands one gradient to both of its operands.
            scaled = gradient * weight
            summed[path] = scaled if path not in summed else summed[path].add_(scaled)
        lab.meter.count((1 + BACKWARD) / len(lab.windows))
    return summed


@torch.no_grad()
def _split(
    lab: Lab,
    sites: Sequence[SimulatedSite],
    cut: Cut,
    ids: Tensor,
    gradients: Gradients,
    found: dict[str, PathSite],
) -> None:
    """Run the quantized window once more and split <gradient, e_s> by part, token and channel."""

    def recording(site: SimulatedSite, *operands: Tensor) -> Tensor:
        _split_site(found[site.path], site, gradients[site.path], *operands)
        return site.output(EVERY_PART & frozenset(site.causes), *operands)

    under = {each.node: partial(recording, each) for each in sites}
    last = max(sites, key=lambda each: lab.position(each.node))
    after = lab.executor.nodes[lab.position(last.node) + 1]
    lab.executor.advance(cut, after, instead=under)
    lab.meter.count(3 / len(lab.windows))


def _split_site(
    figures: PathSite, site: SimulatedSite, gradient: Tensor, *operands: Tensor
) -> None:
    if not isinstance(site, LinearSite):
        errors = site.errors(*operands)
        whole = torch.stack(list(errors.values())).sum(0)
        figures.tokens.append(site.by_token(gradient * whole))
        for cause, error in errors.items():
            figures.causes[cause] += _dot(gradient, error)
        return
    (x,) = operands
    # <g, d Ŵ^T> = <g Ŵ, d>: a product with g for each part of the weight, and one for all of x.
    by_input: dict[Cause, Tensor] = {
        cause: (gradient @ error) * x for cause, error in site.weight_errors().items()
    }
    input_errors = site.input_errors(x)
    if input_errors:
        pulled = gradient @ site.coded_weight
        for cause, error in input_errors.items():
            own = pulled * error
            by_input[cause] = own if cause not in by_input else by_input[cause] + own
    total = sum(value.to(torch.float32) for value in by_input.values())
    assert isinstance(total, Tensor)
    for cause, value in by_input.items():
        figures.causes[cause] += float(value.to(torch.float64).sum())
    figures.tokens.append(total.sum(-1).flatten())
    channels = total.flatten(0, -2).sum(0)
    figures.channels = channels if figures.channels is None else figures.channels + channels
