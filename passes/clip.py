"""clip: choose each weight's range for the least squared error instead of its extremes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.ir.graph import Level, coded_linears
from fxquant.ir.weights import choose_codes
from fxquant.numerics.weight_codes import WeightCodes, searched_codes
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
            choose = partial(_searched, spec=spec.weight)
            changed = choose_codes(gm, site.path, spec.weight, choose, self.name)
            yield site.path, Changed() if changed else Blocked("no narrower range rounds it better")


def _searched(weight: Tensor, spec: TensorSpec) -> WeightCodes:
    alike = torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
    return searched_codes(weight, spec, alike)
