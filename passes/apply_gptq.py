"""gptq: choose the codes of every linear by second-order rounding, block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fxquant.errors import SchemeError
from fxquant.passes.gptq import gptq
from fxquant.passes.layerwise import Layer, Layerwise, stacked_start
from fxquant.passes.weight_codes import WeightCodes


@dataclass(frozen=True)
class Gptq(Layerwise):
    """GPTQ (Frantar et al. 2023) over the model; the solver is ``fxquant.passes.gptq.gptq``.

    before:  y = call_module layers.0.fc1(x)        nn.Linear or Conv1D
    after:   y = call_module layers.0.fc1(x)        CodedLinear: the same weight, codes chosen

    ``grid``: "search" shrinks the min-max range to the least second-order error, "minmax" takes it
    as it is, as the paper's tables do (with ``within=block``). Where an earlier repair (clip, awq)
    has chosen a site's scales, they stay.
    """

    damping: float = 0.01
    order: str = "none"
    block_size: int = 128
    grid: str = "search"
    name = "gptq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("none", "static"):
            raise SchemeError(f"gptq: order must be none or static, got {self.order}")
        if self.grid not in ("search", "minmax"):
            raise SchemeError(f"gptq: grid must be search or minmax, got {self.grid}")
        if not 0 <= self.damping <= 1 or self.block_size < 1:
            raise SchemeError(
                f"gptq: damping must be 0..1 and block_size at least 1, got {self.damping} and "
                f"{self.block_size}"
            )

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
            order="static" if self.order == "static" else "none",
            grid=None if start is None else (start.scales, start.zero_points),
        )
        if found.damping > self.damping:
            raised = f"; damping raised from {self.damping:g} to {found.damping:g}"
            return replace(found, note=f"{raised}: the Hessian was not positive definite")
        return found
