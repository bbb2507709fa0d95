"""What another choice at one site would recover, everything else quantized as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fxquant.analysis.calibrated import Calibrated
from fxquant.analysis.lab import Cuts, Lab, Setting, setting
from fxquant.analysis.local import LocalFigures
from fxquant.analysis.sites import LinearSite, ProductSite, SimulatedSite, SiteMaker
from fxquant.formats.integer import IntegerGrid, integer
from fxquant.numerics.observers import HistogramObserver
from fxquant.numerics.quantizer import Quantizer
from fxquant.numerics.static_input import static_quantizer
from fxquant.numerics.weight_codes import min_max_codes
from fxquant.schemes.specs import ActivationSpec, Estimator, TensorSpec

_TOP = (1, 4)
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Counterfactual:
    """One other choice at ``site``: the loss difference with it, and what it recovers, in nats."""

    site: str
    choice: str
    delta_loss: float
    recovered: float


def choices(
    site: SimulatedSite, figures: LocalFigures, maker: SiteMaker, calibrated: Calibrated
) -> Iterator[tuple[str, Function]]:
    """(name, function in place of the site) for every choice that differs from the site's own.

    A static range of changed inputs is chosen anew by the site's own estimator.
    """
    yield "float", partial(site.output, frozenset())
    if isinstance(site, ProductSite):
        yield "left operand in float", lambda a, b: a @ site.coded_right(b)
        yield "right operand in float", lambda a, b: site.left(a) @ b
    if not isinstance(site, LinearSite):
        return
    own = site.quantizer
    if own is None:
        yield from _weight_choices(site)
        return
    yield "float weight", lambda x: nn.functional.linear(own(x), site.weight, site.bias)
    for name, quantizer in _quantizers(site, own, maker):
        yield name, partial(_linear, site, quantizer)
    for count in _TOP:
        name = "worst channel in float" if count == 1 else f"worst {count} channels in float"
        yield name, _top_channels(site, own, figures, count, calibrated.rows)
    if calibrated.smoothing is not None:
        yield "smoothing", _smoothed(site, own, calibrated.rows, calibrated.smoothing)


def _linear(site: LinearSite, quantizer: Quantizer, x: Tensor) -> Tensor:
    return nn.functional.linear(quantizer(x), site.coded_weight, site.bias)


def _weight_choices(site: LinearSite) -> Iterator[tuple[str, Function]]:
    assert site.spec.weight is not None
    grid = site.spec.weight.grid
    affine = integer(grid.bits, symmetric=False) if isinstance(grid, IntegerGrid) else grid
    finer = TensorSpec(affine, "group", group_size=32)
    if finer == site.spec.weight:
        return
    coded = min_max_codes(site.weight, finer, site.path).dequantize(site.weight.dtype)
    yield "groups of 32", lambda x: nn.functional.linear(x, coded, site.bias)


def _quantizers(
    site: LinearSite, own: Quantizer, maker: SiteMaker
) -> Iterator[tuple[str, Quantizer]]:
    spec = site.spec.activation
    assert spec is not None
    yield "16-bit activation, same range", own.with_bits(16)
    token = ActivationSpec(TensorSpec(spec.tensor.grid, "token"))
    tensor = ActivationSpec(TensorSpec(spec.tensor.grid, "tensor"))
    others: list[tuple[str, ActivationSpec]] = [
        ("dynamic per token", token),
        ("dynamic per tensor", tensor),
    ]
    if site.observer is not None:
        others += [
            (f"static {kind}", ActivationSpec(tensor.tensor, Estimator(kind)))
            for kind in ("absmax", "mse")
        ]
    for name, other in others:
        if other != spec:
            quantizer = maker.quantizer(site.path, other)
            assert quantizer is not None
            yield name, quantizer


def _anew(site: LinearSite, own: Quantizer, inputs: Sequence[Tensor]) -> Quantizer:
    """The site's quantizer for changed inputs: a static range is estimated from them anew."""
    spec = site.spec.activation
    assert spec is not None
    if spec.dynamic:
        return own
    observer = HistogramObserver(site.path).to(site.weight.device)
    for rows in inputs:
        observer(rows, torch.ones(1, rows.shape[0], dtype=torch.int64, device=rows.device))
    return static_quantizer(observer, spec)


def _top_channels(
    site: LinearSite,
    own: Quantizer,
    figures: LocalFigures,
    count: int,
    calibrated: Sequence[Tensor],
) -> Function:
    """The worst input channels run in float beside the rest (Dettmers et al., "LLM.int8()")."""
    blame = figures.blame
    assert blame is not None
    top = blame.topk(min(count, blame.numel())).indices
    keep = torch.ones_like(blame, dtype=site.weight.dtype)
    keep[top] = 0
    quantizer = _anew(site, own, [rows * keep for rows in calibrated]) if calibrated else own
    rest, kept = site.coded_weight * keep, site.weight[:, top]

    def function(x: Tensor) -> Tensor:
        exact = nn.functional.linear(x[..., top], kept)
        return nn.functional.linear(quantizer(x * keep), rest, site.bias) + exact

    return function


def _smoothed(site: LinearSite, own: Quantizer, rows: Sequence[Tensor], scale: Tensor) -> Function:
    """``+smooth`` at this site alone: an explicit division of the input."""
    assert site.spec.weight is not None
    weight = (site.weight.float() * scale).to(site.weight.dtype)
    coded = min_max_codes(weight, site.spec.weight, site.path).dequantize(weight.dtype)
    factor = scale.to(site.weight.dtype)
    quantizer = _anew(site, own, [each / factor for each in rows])
    return lambda x: nn.functional.linear(quantizer(x / factor), coded, site.bias)


def measure(
    lab: Lab,
    sites: Sequence[SimulatedSite],
    site: SimulatedSite,
    cuts: Cuts,
    alternatives: Iterator[tuple[str, Function]],
    known: Mapping[str, float],
    loss_float: float,
    loss_quantized: float,
    remember: Callable[[str, Callable[[], float]], float],
) -> list[Counterfactual]:
    """Every alternative at ``site``, most recovered first; ``cuts`` stand before the site.

    ``known``: losses of alternatives that need not be run again, by name.
    """
    found = []
    for name, function in alternatives:
        under: Setting = {**setting(sites), site.node: function}
        loss = known.get(name)
        if loss is None:
            loss = remember(name, lambda under=under: lab.loss(under, cuts))  # type: ignore[misc]
        found.append(Counterfactual(site.path, name, loss - loss_float, loss_quantized - loss))
    return sorted(found, key=lambda each: -each.recovered)


@dataclass(frozen=True)
class Recovery:
    """The loss difference left when the ``fixed`` worst sites run in float."""

    fixed: int
    delta_loss: float


def recovery_counts(sites: int, ranked: int) -> list[int]:
    """0, 1, 2, 4, 8, ... below the number of sites and up to those ``ranked``, then all."""
    counts = [0]
    step = 1
    while step < sites and step <= ranked:
        counts.append(step)
        step *= 2
    return [*counts, sites]
