"""Local figures: one run of the fully quantized model splits the error of every site exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxquant.analysis.floor import floor_energy
from fxquant.analysis.lab import Lab
from fxquant.analysis.parts import CAUSES, EVERY_PART, Cause
from fxquant.analysis.sites import LinearSite, SimulatedSite


@dataclass
class LocalFigures:
    """Sums over all windows at one site, on the input that arrives in the quantized model.

    Energies are sums of squares: ``energy`` of each part, ``total`` of ŷ - y, ``signal`` of y
    without its bias, ``floor`` of what the best range of the same granularity leaves (see floor.py;
    for each window by itself, so a static range is held against the best of each window).
    ``channels`` [K]: energy of each part by input channel, sum_t (error of x)_k^2 |Ŵ_k|^2.
    ``peaks`` [K]: max |x| of each channel. ``tokens``: for each window the energy of
    ŷ - y at each token [b * L] (OPT's blocks flatten batch and length).
    """

    energy: dict[Cause, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    total: float = 0.0
    signal: float = 0.0
    floor: float = 0.0
    outputs: int = 0
    inputs: int = 0
    clipped: int = 0
    flushed: int = 0
    channels: dict[Cause, Tensor] = field(default_factory=dict)
    peaks: Tensor | None = None
    tokens: list[Tensor] = field(default_factory=list)

    @property
    def range_mismatch(self) -> float:
        """Rounding energy over the floor; negative where the range is narrower than the best."""
        return self.energy["rounding"] - self.floor

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal / total); infinite where nothing is lost."""
        if not self.total:
            return math.inf
        return 10 * math.log10(self.signal / self.total) if self.signal else -math.inf

    @property
    def mse(self) -> float:
        return self.total / max(self.outputs, 1)

    @property
    def share_clipped(self) -> float:
        return self.clipped / self.inputs if self.inputs else 0.0

    @property
    def share_flushed(self) -> float:
        """Share of the input's elements that are not zero, but whose code says zero."""
        return self.flushed / self.inputs if self.inputs else 0.0

    @property
    def cause(self) -> Cause:
        """The part with the largest energy."""
        return max(CAUSES, key=lambda cause: self.energy[cause])


def local_figures(
    lab: Lab, sites: Sequence[SimulatedSite]
) -> tuple[dict[str, LocalFigures], float]:
    """Figures of every site, and the loss of the quantized model, from one streaming run."""
    found = {each.path: LocalFigures() for each in sites}

    def recording(site: SimulatedSite, x: Tensor) -> Tensor:
        y = site.output(x, EVERY_PART & frozenset(site.causes))
        _record(found[site.path], site, x)
        return y

    under = {each.node: lambda x, each=each: recording(each, x) for each in sites}
    return found, lab.loss(under)


def _record(figures: LocalFigures, site: SimulatedSite, x: Tensor) -> None:
    errors = site.errors(x)
    total = torch.stack(list(errors.values())).sum(0).to(torch.float32)
    for cause, error in errors.items():
        figures.energy[cause] += _energy(error)
    figures.total += _energy(total)
    figures.outputs += total.numel()
    figures.tokens.append(total.square().sum(-1).flatten())
    if isinstance(site, LinearSite):
        figures.signal += _energy(site.product(x))
        figures.floor += floor_energy(site, x)
        _record_inputs(figures, site, x)
    else:
        figures.signal += _energy(site.output(x, frozenset()))


def _energy(values: Tensor) -> float:
    return float(values.to(torch.float64).square().sum())


def _record_inputs(figures: LocalFigures, site: LinearSite, x: Tensor) -> None:
    rows = x.flatten(0, -2)
    peaks = rows.abs().amax(0)
    figures.peaks = peaks if figures.peaks is None else torch.maximum(figures.peaks, peaks)
    columns = site.coded_weight.to(torch.float32).square().sum(0)
    added: dict[Cause, Tensor] = {
        "weights": _channels(rows, site.weight_error.to(torch.float32).square().sum(0))
    }
    if site.quantizer is not None:
        step = site.quantizer.qparams(x)[0] / 2
        split = site.quantizer.split(x)
        figures.inputs += x.numel()
        figures.clipped += int(((split.clipped - x).abs() > step).sum())
        figures.flushed += int(((split.rounded == 0) & (x != 0)).sum())
        added["clipping"] = _channels((split.clipped - x).flatten(0, -2), columns)
        added["rounding"] = _channels((split.rounded - split.clipped).flatten(0, -2), columns)
    for cause, energy in added.items():
        before = figures.channels.get(cause)
        figures.channels[cause] = energy if before is None else before + energy


def _channels(errors: Tensor, columns: Tensor) -> Tensor:
    """Energy by channel [K] of input errors [T, K], weighted by the columns' norms squared [K]."""
    return errors.to(torch.float32).square().sum(0) * columns
