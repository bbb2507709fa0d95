"""The rounding floor: what the best range of the same granularity would leave at a site."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fxquant.analysis.parts import InputQuantizer
from fxquant.analysis.sites import LinearSite

_STEPS = 16  # from the absmax down to 1/181 of it, each sqrt(2) smaller


def floor_energy(site: LinearSite, x: Tensor) -> float:
    """Energy of (Q(x) - x) Ŵ^T under the range that leaves least of it, for this x [..., K].

    Ranges are the extremes of x times 2^(-i/2), per tensor or per token as the site has it. They
    are compared by sum_k (Q(x) - x)_k^2 |Ŵ_k|^2, that is, as if errors of different columns were
    uncorrelated; the energy of the best is exact.
    """
    quantizer = site.quantizer
    if quantizer is None:
        return 0.0
    columns = site.coded_weight.to(torch.float32).square().sum(0)
    dynamic = replace(quantizer, scale=None, zero_point=None)
    per_token = quantizer.granularity == "token"
    best: Tensor | None = None
    least: Tensor | None = None
    for step in range(_STEPS):
        error = _with_range(dynamic, x, 2 ** (-step / 2)) - x
        energy = error.to(torch.float32).square() @ columns
        energy = energy.unsqueeze(-1) if per_token else energy.sum()
        if best is None or least is None:
            best, least = error, energy
        else:
            best = torch.where(energy < least, error, best)
            least = torch.minimum(energy, least)
    assert best is not None
    return float(nn.functional.linear(best, site.coded_weight).to(torch.float64).square().sum())


def _with_range(quantizer: InputQuantizer, x: Tensor, share: float) -> Tensor:
    """x quantized into ``share`` of its own range; scales shrink, zero points stay."""
    scale, zero_point = quantizer.qparams(x)
    return quantizer.rounded(x, scale * share, zero_point)
