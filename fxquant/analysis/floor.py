"""The floor of a range: what the best range of the same granularity would leave at a site."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fxquant.analysis.sites import LinearSite

_FINER = (1 / 4, 1 / 8, 1 / 16)  # halvings of the step, in octaves
_STEPS = 16  # from the absmax down to 1/181 of it, each sqrt(2) smaller


def floor_energy(site: LinearSite, x: Tensor, own: float | None = None) -> float:
    """Energy of (Q(x) - x) Ŵ^T under the range that leaves least of it, for this x [..., K].

    Ranges are the site's own and the extremes of x times 2^(-i/2), then, around the best of these,
    2^(±1/4), 2^(±1/8) and 2^(±1/16) of it; per tensor or per token as the site has it. They are
    compared by sum_k (Q(x) - x)_k^2 |Ŵ_k|^2, that is, as if errors of different columns were
    uncorrelated; the energy of the best is exact, and at most ``own``, that under the site's own
    range (None: it is computed).
    """
    quantizer = site.quantizer
    if quantizer is None:
        return 0.0
    columns = site.coded_weight.to(torch.float32).square().sum(0)
    dynamic = replace(quantizer, scale=None, zero_point=None)
    scale, zero_point = dynamic.qparams(x)
    per_token = quantizer.spec.granularity == "token"

    def error(share: Tensor) -> Tensor:
        """Of ``share`` of the range: scales shrink, zero points stay."""
        return dynamic.rounded(x, scale * share, zero_point) - x

    def energy(share: Tensor) -> Tensor:
        found = error(share).to(torch.float32).square() @ columns
        return found.unsqueeze(-1) if per_token else found.sum()

    share = x.new_ones((*x.shape[:-1], 1) if per_token else (), dtype=torch.float32)
    least = energy(share)
    coarse = [share * 2 ** (-step / 2) for step in range(1, _STEPS)]
    for step in (None, *_FINER):
        for tried in coarse if step is None else [share * 2**step, share * 2**-step]:
            found = energy(tried)
            share, least = torch.where(found < least, tried, share), torch.minimum(found, least)
    if own is None:
        own = _output_energy(site, quantizer(x) - x)
    return min(_output_energy(site, error(share)), own)


def _output_energy(site: LinearSite, error: Tensor) -> float:
    return float(nn.functional.linear(error, site.coded_weight).to(torch.float64).square().sum())
