"""refine: coordinate descent on every linear's codes, after gptq or on codes rounded to nearest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxquant.numerics.solvers.coordinate_descent import coordinate_descent
from fxquant.numerics.weight_codes import WeightCodes, searched_codes
from fxquant.pipeline.layerwise import Layer, Layerwise, stacked_start
from fxquant.pipeline.options import Rounds, Share


@dataclass(frozen=True)
class Refine(Layerwise):
    """QuantEase (Behdin et al. 2023) over the model: ``coordinate_descent`` on every layer.

    before:  y = call_module layers.0.fc1(x)        CodedLinear or a plain linear
    after:   y = call_module layers.0.fc1(x)        CodedLinear with better codes, the same grid

    ``damping``: of the Hessian, as a share of the median of its diagonal.

    Sites without codes start from rounding to nearest, with scales that minimize the error
    weighted by the Hessian's diagonal.
    """

    steps: Rounds = 4
    damping: Share = 0.01
    name = "refine"

    def solve(self, weight: Tensor, hessian: Tensor, layers: tuple[Layer, ...]) -> WeightCodes:
        spec = layers[0].spec
        start = stacked_start(layers)
        if start is None:
            start = searched_codes(weight, spec, hessian.diagonal())
        return coordinate_descent(weight, hessian, start, steps=self.steps, damping=self.damping)
