"""gptq: choose the codes of every linear by second-order rounding, block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from fxquant.numerics.solvers.gptq import gptq
from fxquant.numerics.weight_codes import WeightCodes
from fxquant.pipeline.layerwise import Layer, Layerwise, stacked_start
from fxquant.pipeline.options import Count, Share


@dataclass(frozen=True)
class Gptq(Layerwise):
    """GPTQ (Frantar et al. 2023) over the model; the solver is in ``numerics.solvers``.

    before:  y = call_module layers.0.fc1(x)        nn.Linear or Conv1D
    after:   y = call_module layers.0.fc1(x)        CodedLinear: the same weight, codes chosen

    ``grid``: "search" shrinks the min-max range to the least second-order error, "minmax" takes it
    as it is, as the paper's tables do (with ``within=block``). Where an earlier repair (clip, awq)
    has chosen a site's scales, they stay.
    """

    damping: Share = 0.01
    order: Literal["none", "static"] = "none"
    block_size: Count = 128
    grid: Literal["search", "minmax"] = "search"
    name = "gptq"

    def solve(self, weight: Tensor, hessian: Tensor, layers: tuple[Layer, ...]) -> WeightCodes:
        start = stacked_start(layers)
        if start is None and self.grid == "minmax":
            start = stacked_start(tuple(replace(layer, start=layer.before) for layer in layers))
        found = gptq(
            weight,
            hessian,
            layers[0].spec,
            block_size=self.block_size,
            damping=self.damping,
            order=self.order,
            grid=None if start is None else (start.scales, start.zero_points),
            global_scale=None if start is None else start.global_scale,
        )
        if found.damping > self.damping:
            raised = f"; damping raised from {self.damping:g} to {found.damping:g}"
            return replace(found, note=f"{raised}: the Hessian was not positive definite")
        return found
