"""clip: choose each weight's range for the least squared error instead of its extremes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from fxquant.errors import SchemeError
from fxquant.ir.graph import Level, Site, coded_linears, install, linear_parameters
from fxquant.ir.leaves import CodedLinear
from fxquant.numerics.weight_codes import min_max_codes, round_to_nearest, search_scales
from fxquant.pipeline.context import Context
from fxquant.pipeline.repair import Repair
from fxquant.schemes.specs import TensorSpec
from fxquant.structure.outcome import Blocked, Changed, Outcome


@dataclass(frozen=True)
class Clip(Repair):
    """MSE range of weights: clip the few largest where that makes the rest finer.

    before:  y = fc1(x)        codes at quantize: scale = max|w| / qmax
    after:   y = fc1(x)        codes chosen: scale = c max|w| / qmax, c at the least sum (w - w^)^2

    For each row, group or tensor, as the scheme has its scales (Banner et al. 2019 do this for
    activations; GPTQ's ``mse`` option for weights). The float function is unchanged. Needs no
    data; what weighs the errors by the inputs they meet is ``awq(scale=false)``.
    """

    name = "clip"
    requires = (Level.FLOAT,)
    effect = "exact"
    needs_calibration = False

    def apply(self, gm: GraphModule, context: Context) -> Iterator[Outcome]:
        for site, _, spec in list(coded_linears(gm, context.scheme)):
            assert spec.weight is not None
            changed = _clip(gm, site, spec.weight)
            yield site.path, Changed() if changed else Blocked("no narrower range rounds it better")


def _clip(gm: GraphModule, site: Site, spec: TensorSpec) -> bool:
    module = gm.get_submodule(site.path)
    if isinstance(module, CodedLinear):
        raise SchemeError(
            f"clip: {site.path}: an earlier pass has chosen its codes; write +clip before it"
        )
    weight, bias = linear_parameters(module)
    nearest = min_max_codes(weight, spec, site.path)
    grid = search_scales(
        weight, spec, torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
    )
    chosen = round_to_nearest(weight, spec, *grid)
    install(gm, site.path, CodedLinear(weight, bias, spec, chosen.tensors()))
    return not torch.equal(nearest.codes, chosen.codes)
