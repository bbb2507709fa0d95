"""What another choice at one site would recover, everything else quantized as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.analysis.lab import Cuts, Lab, Setting, setting
from fxquant.analysis.local import LocalFigures
from fxquant.analysis.parts import InputQuantizer
from fxquant.analysis.sites import (
    LinearSite,
    ProductSite,
    SimulatedSite,
    SiteMaker,
    dequantized_weight,
)
from fxquant.graph import source_of
from fxquant.observers import HistogramObserver
from fxquant.passes.quantize import quantize_weight
from fxquant.passes.static_input import static_qparams
from fxquant.specs import ActivationSpec, Estimator, TensorSpec

_ALPHA = 0.5
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
    site: SimulatedSite, figures: LocalFigures, maker: SiteMaker, calibrated: Sequence[Tensor]
) -> Iterator[tuple[str, Function]]:
    """(name, function in place of the site) for every choice that differs from the site's own.

    ``calibrated``: inputs [T, K] that the site saw while calibrating, for ranges and statistics
    of changed inputs. A static range is chosen anew by the site's own estimator.
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
    yield "float weight", partial(site.output, frozenset(("clipping", "rounding")))
    for name, quantizer in _quantizers(site, own, maker):
        yield name, partial(_linear, site, quantizer)
    for count in _TOP:
        name = "worst channel in float" if count == 1 else f"worst {count} channels in float"
        yield name, _top_channels(site, own, figures, count, calibrated)
    if calibrated:
        yield "smoothing", _smoothed(site, own, calibrated)


def _linear(site: LinearSite, quantizer: InputQuantizer, x: Tensor) -> Tensor:
    return nn.functional.linear(quantizer(x), site.coded_weight, site.bias)


def _weight_choices(site: LinearSite) -> Iterator[tuple[str, Function]]:
    assert site.spec.weight is not None
    finer = TensorSpec(site.spec.weight.bits, symmetric=False, granularity="group", group_size=32)
    if finer == site.spec.weight:
        return
    coded = dequantized_weight(quantize_weight(site.weight, finer, site.path), finer, site.weight)
    yield "groups of 32", lambda x: nn.functional.linear(x, coded, site.bias)


def _quantizers(
    site: LinearSite, own: InputQuantizer, maker: SiteMaker
) -> Iterator[tuple[str, InputQuantizer]]:
    spec = site.spec.activation
    assert spec is not None
    yield "16-bit activation, same range", own.with_bits(16)
    token = ActivationSpec(replace(spec.tensor, granularity="token"))
    tensor = ActivationSpec(replace(spec.tensor, granularity="tensor"))
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


def _anew(site: LinearSite, own: InputQuantizer, inputs: Sequence[Tensor]) -> InputQuantizer:
    """The site's quantizer for changed inputs: a static range is estimated from them anew."""
    spec = site.spec.activation
    assert spec is not None
    if spec.dynamic:
        return own
    observer = HistogramObserver(site.path).to(site.weight.device)
    for rows in inputs:
        observer(rows, torch.ones(1, rows.shape[0], dtype=torch.int64, device=rows.device))
    found = static_qparams(observer, spec)
    return replace(own, scale=found["input_scale"], zero_point=found.get("input_zero_point"))


def _top_channels(
    site: LinearSite,
    own: InputQuantizer,
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


def _smoothed(site: LinearSite, own: InputQuantizer, calibrated: Sequence[Tensor]) -> Function:
    """Xiao et al., "SmoothQuant", 2022, equation 4, with an explicit division of the input."""
    assert site.spec.weight is not None
    peaks = torch.stack([rows.abs().amax(0) for rows in calibrated]).amax(0).to(torch.float32)
    widest = site.weight.abs().amax(0).to(torch.float32)
    factor = peaks.clamp(min=1e-5) ** _ALPHA
    factor = factor / widest.clamp(min=1e-5) ** (1 - _ALPHA)
    factor = factor.clamp(min=1e-5).to(site.weight.dtype)
    weight = site.weight * factor
    codes = quantize_weight(weight, site.spec.weight, site.path)
    coded = dequantized_weight(codes, site.spec.weight, weight)
    quantizer = _anew(site, own, [rows / factor for rows in calibrated])
    return lambda x: nn.functional.linear(quantizer(x / factor), coded, site.bias)


@torch.no_grad()
def calibration_inputs(
    lab: Lab, sites: Sequence[SimulatedSite], batches: Sequence[dict[str, Tensor]]
) -> dict[str, list[Tensor]]:
    """The attended rows [T, K] that reach the linears of ``sites`` in the float graph, by batch."""
    found: dict[str, list[Tensor]] = {each.path: [] for each in sites}
    linears = [each for each in sites if isinstance(each, LinearSite)]
    executor = lab.executor
    last = max((executor.position[each.node] for each in linears), default=0)
    for inputs in batches:
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))

        def keep(node: Node, value: Tensor, mask: Tensor = mask) -> Tensor:
            for each in linears:
                if source_of(each.node) is node:
                    rows = value.reshape(mask.numel(), -1)
                    found[each.path].append(rows[mask.reshape(-1).bool()])
            return value

        executor.advance(executor.start(**inputs), executor.nodes[last], keep)
    return found


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
