"""Local figures: one run of the fully quantized model splits the error of every site exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fxquant.analysis.floor import floor_energy
from fxquant.analysis.lab import Lab
from fxquant.analysis.parts import EVERY_PART, Cause, no_figures
from fxquant.analysis.sites import LinearSite, SimulatedSite
from fxquant.numerics.quantization import expand_groups
from fxquant.numerics.quantizer import Quantizer


@dataclass
class LocalFigures:
    """Sums over all windows at one site, on the input that arrives in the quantized model.

    Energies are sums of squares: ``energy`` of each part ("scale": what it adds to that of weights
    and rounding, which may be less than nothing), ``total`` of ŷ - y, ``signal`` of y
    without its bias, ``input`` of clipping and rounding together, ``floor`` of what the best range
    of the same granularity would leave of these (see floor.py; for each window by itself, so a
    static range is held against the best of each window). By channel and token the part "scale" is
    within "weights" and "rounding".
    ``channels`` [K]: energy of each part by input channel, sum_t (error of x)_k^2 |Ŵ_k|^2.
    ``peaks`` [K]: max |x| of each channel. ``tokens``: for each window the energy of ŷ - y at each
    token [b * L] (OPT's blocks flatten batch and length). ``blame`` [K] and ``token_blame``: the
    same energies, but rounding's is given to those that stretch the range: see stretch().
    """

    energy: dict[Cause, float] = field(default_factory=lambda: no_figures(()))
    total: float = 0.0
    signal: float = 0.0
    input: float = 0.0
    floor: float = 0.0
    outputs: int = 0
    inputs: int = 0
    clipped: int = 0
    flushed: int = 0
    channels: dict[Cause, Tensor] = field(default_factory=dict)
    peaks: Tensor | None = None
    tokens: list[Tensor] = field(default_factory=list)
    blame: Tensor | None = None
    token_blame: list[Tensor] = field(default_factory=list)

    @property
    def range_mismatch(self) -> float:
        """What the range adds to the floor: energy of clipping and rounding together over it."""
        return self.input - self.floor

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
        return max(self.energy, key=lambda cause: self.energy[cause])


def local_figures(
    lab: Lab, sites: Sequence[SimulatedSite], advance: Callable[[], object] = lambda: None
) -> tuple[dict[str, LocalFigures], float]:
    """Figures of every site, and the loss of the quantized model, from one streaming run."""
    found = {each.path: LocalFigures(no_figures(each.causes)) for each in sites}

    def recording(site: SimulatedSite, *operands: Tensor) -> Tensor:
        y = site.output(EVERY_PART & frozenset(site.causes), *operands)
        _record(found[site.path], site, *operands)
        return y

    under = {each.node: partial(recording, each) for each in sites}
    return found, lab.loss(under, advance=advance)


def stretch(peaks: Tensor) -> Tensor:
    """Who stretches a range, from the largest |x| of each candidate [..., C]: shares that sum to 1.

    Rounding energy grows with the square of the range, so without the largest candidate the share
    (p_1^2 - p_2^2) / p_1^2 would go, without the next (p_2^2 - p_3^2) / p_1^2, and so on. A channel
    with a huge activation may hold little rounding error itself and yet cause all of it. Equal
    candidates share evenly. What lies beyond a static range does not stretch it: see reach().
    """
    ordered, order = peaks.to(torch.float64).square().sort(dim=-1, descending=True)
    below = torch.nn.functional.pad(ordered, (0, 1))[..., 1:]
    shares = (ordered - below) / ordered[..., :1].clamp(min=torch.finfo(torch.float64).tiny)
    # Of equal candidates the last has the share of all: give it out evenly.
    new = torch.nn.functional.pad(ordered[..., 1:] != ordered[..., :-1], (1, 0))
    run = new.to(torch.int64).cumsum(-1)
    sums = torch.zeros_like(shares).scatter_add(-1, run, shares)
    counts = torch.zeros_like(shares).scatter_add(-1, run, torch.ones_like(shares))
    return torch.zeros_like(shares).scatter(-1, order, (sums / counts.clamp(min=1)).gather(-1, run))


def reach(quantizer: Quantizer, x: Tensor) -> Tensor:
    """How far each element stretches the range: |x|, in a static range at most to its end."""
    return (x if quantizer.scale is None else quantizer.split(x).clipped).abs()


def _record(figures: LocalFigures, site: SimulatedSite, *operands: Tensor) -> None:
    errors = site.errors(*operands)
    total = torch.stack(list(errors.values())).sum(0).to(torch.float32)
    scale = errors.pop("scale", None)
    for cause, error in errors.items():
        figures.energy[cause] += _energy(error)
    if scale is not None:  # one draw of rounding less another: by itself its energy says nothing
        rest = torch.stack([e for cause, e in errors.items() if cause != "clipping"]).sum(0)
        figures.energy["scale"] += _energy(rest + scale) - _energy(rest)
        other: Cause = "rounding" if "rounding" in errors else "weights"
        errors[other] = errors[other] + scale
    figures.total += _energy(total)
    figures.outputs += total.numel()
    by_token = {cause: _by_token(site, error) for cause, error in errors.items()}
    figures.tokens.append(_by_token(site, total))
    rounding = by_token.pop("rounding", torch.zeros_like(figures.tokens[-1]))
    blame = torch.stack([*by_token.values(), torch.zeros_like(rounding)]).sum(0)
    if isinstance(site, LinearSite):
        (x,) = operands
        figures.signal += _energy(site.product(x))
        own = _input_energy(site, x, errors, total)
        figures.input += own
        figures.floor += floor_energy(site, x, own)
        rows = x.flatten(0, -2)
        if site.quantizer is not None and site.quantizer.spec.granularity == "tensor":
            peaks = reach(site.quantizer, rows).amax(-1)
            rounding = rounding.sum() * stretch(peaks).to(torch.float32)
        _record_inputs(figures, site, rows)
    else:
        figures.signal += _energy(site.output(frozenset(), *operands))
    figures.token_blame.append(blame + rounding)


def _input_energy(
    site: LinearSite, x: Tensor, errors: Mapping[Cause, Tensor], total: Tensor
) -> float:
    """Of clipping and rounding of the input together."""
    if site.quantizer is None:
        return 0.0
    if site.simulated.split is not None:  # what its scales clip of the weight is clipping too
        return _energy(total - torch.nn.functional.linear(x, site.weight_error))
    both = [error for cause, error in errors.items() if cause != "weights"]
    return _energy(torch.stack(both).sum(0)) if both else 0.0


def _energy(values: Tensor) -> float:
    return float(values.to(torch.float64).square().sum())


def _by_token(site: SimulatedSite, errors: Tensor) -> Tensor:
    return site.by_token(errors.to(torch.float32).square())


def _record_inputs(figures: LocalFigures, site: LinearSite, rows: Tensor) -> None:
    peaks = rows.abs().amax(0)
    figures.peaks = peaks if figures.peaks is None else torch.maximum(figures.peaks, peaks)
    columns = site.coded_weight.to(torch.float32).square().sum(0)
    weights = _channels(rows, site.weight_error.to(torch.float32).square().sum(0))
    added: dict[Cause, Tensor] = {"weights": weights}
    blame = weights
    if site.quantizer is not None:
        step = site.quantizer.qparams(rows)[0]
        split = site.quantizer.split(rows)
        figures.inputs += rows.numel()
        step = expand_groups(step, rows.shape[-1], site.quantizer.spec.group_size)
        figures.clipped += int(((split.clipped - rows).abs() > step / 2).sum())
        figures.flushed += int(((split.rounded == 0) & (rows != 0)).sum())
        rounding = (split.rounded - split.clipped).to(torch.float32).square() * columns
        added["clipping"] = _channels(split.clipped - rows, columns)
        added["rounding"] = rounding.sum(0)
        if site.quantizer.spec.granularity == "token":
            by_channel = (stretch(rows.abs()).T @ rounding.sum(-1).double()).to(torch.float32)
        elif site.quantizer.spec.granularity == "group":
            by_channel = rounding.sum(0)  # a group is narrow: each column answers for its own
        else:
            within = reach(site.quantizer, rows).amax(0)
            by_channel = rounding.sum() * stretch(within).to(torch.float32)
        blame = blame + added["clipping"] + by_channel
    figures.blame = blame if figures.blame is None else figures.blame + blame
    for cause, energy in added.items():
        before = figures.channels.get(cause)
        figures.channels[cause] = energy if before is None else before + energy


def _channels(errors: Tensor, columns: Tensor) -> Tensor:
    """Energy by channel [K] of input errors [T, K], weighted by the columns' norms squared [K]."""
    return errors.to(torch.float32).square().sum(0) * columns
