"""The rounding floor: what the best range of the same granularity would leave at a site."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fxquant.analysis.sites import LinearSite
from fxquant.numerics.quantizer import Quantizer

_FINER = (1 / 4, 1 / 8, 1 / 16)  # halvings of the step, in octaves
_STEPS = 16  # from the absmax down to 1/181 of it, each sqrt(2) smaller


def floor_energy(site: LinearSite, x: Tensor) -> float:
    """Energy of (Q(x) - x) Ŵ^T under the range that leaves least of it, for this x [..., K].

    Ranges are the site's own and the extremes of x times 2^(-i/2), then, around the best of these,
    2^(±1/4), 2^(±1/8) and 2^(±1/16) of it; per tensor or per token as the site has it. They are
    compared by sum_k (Q(x) - x)_k^2 |Ŵ_k|^2, that is, as if errors of different columns were
    uncorrelated; the energy of the best is exact, and at most that under the site's own range.
    """
    quantizer = site.quantizer
    if quantizer is None:
        return 0.0
    columns = site.coded_weight.to(torch.float32).square().sum(0)
    dynamic = replace(quantizer, scale=None, zero_point=None)
    per_token = quantizer.spec.granularity == "token"
    share = x.new_ones((*x.shape[:-1], 1) if per_token else (), dtype=torch.float32)
    best = _with_range(dynamic, x, share) - x
    least = _energy(best, columns, per_token)
    coarse = [share * 2 ** (-step / 2) for step in range(1, _STEPS)]
    for step in (None, *_FINER):
        for tried in coarse if step is None else [share * 2**step, share * 2**-step]:
            error = _with_range(dynamic, x, tried) - x
            energy = _energy(error, columns, per_token)
            better = energy < least
            best, least = torch.where(better, error, best), torch.where(better, energy, least)
            share = torch.where(better, tried, share)
    return min(_output_energy(site, error) for error in (best, quantizer(x) - x))


def _energy(error: Tensor, columns: Tensor, per_token: bool) -> Tensor:
    energy = error.to(torch.float32).square() @ columns
    return energy.unsqueeze(-1) if per_token else energy.sum()


def _output_energy(site: LinearSite, error: Tensor) -> float:
    return float(nn.functional.linear(error, site.coded_weight).to(torch.float64).square().sum())


def _with_range(quantizer: Quantizer, x: Tensor, share: Tensor) -> Tensor:
    """x quantized into ``share`` of its own range; scales shrink, zero points stay."""
    scale, zero_point = quantizer.qparams(x)
    return quantizer.rounded(x, scale * share, zero_point)
