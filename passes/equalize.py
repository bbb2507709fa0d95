"""equalize: give both sides of a pair of linears the same range, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.absorption import ScaleGroup, scale_groups
from fxquant.errors import SchemeError
from fxquant.graph import Level, add_note, linear_parameters
from fxquant.passes.smooth import weight_maxima
from fxquant.repair import Repair
from fxquant.rescaling import rescale

MOST_ITERATIONS: Final = 1000


@dataclass(frozen=True)
class Equalize(Repair):
    """Cross-layer equalization (Nagel et al. 2019, arXiv:1906.04721, equation 11). No data.

    before:  y = fc2(relu(fc1(x)))
    after:   y = fc2(relu(fc1(x)))     fc1's row j / s_j, fc2's column j * s_j

    s_j = sqrt(r1_j / r2_j) with r1_j = max|row j| of the first and r2_j = max|column j| of the
    second, so that both become sqrt(r1_j r2_j). Pairs: fc1 and fc2 through ReLU, v_proj and
    out_proj through attention (heads of one key/value group share s), up_proj and down_proj
    through the product. Repeated until no s differs from 1 by more than ``threshold``, at most
    ``iterations`` times: with chains of pairs one round is not enough.
    """

    name = "equalize"
    requires = (Level.FLOAT,)
    effect = "equivalent"
    needs_calibration = False

    iterations: int = 20
    threshold: float = 1e-3

    def __post_init__(self) -> None:
        if not isinstance(self.iterations, int) or not 1 <= self.iterations <= MOST_ITERATIONS:
            raise SchemeError(
                f"equalize: iterations is a number from 1 to {MOST_ITERATIONS}, not "
                f"{self.iterations!r}"
            )
        if not isinstance(self.threshold, (int, float)) or self.threshold <= 0:
            raise SchemeError(f"equalize: threshold is positive, not {self.threshold!r}")

    @property
    def keeps_site_outputs(self) -> bool:
        return False

    def rewrite(self, gm: GraphModule) -> GraphModule:
        pairs = [group for group in scale_groups(gm) if self._is_pair(group)]
        if not pairs:
            raise SchemeError(
                f"equalize had no effect: in this model no linear that scheme {self.scheme} "
                "quantizes gets its input from the rows of another one"
            )
        first_change = 0.0
        for iteration in range(self.iterations):
            change = max(_equalize(gm, pair) for pair in pairs)
            first_change = change if iteration == 0 else first_change
            if change <= self.threshold:
                break
        if first_change <= self.threshold:
            raise SchemeError(
                f"equalize had no effect: all {len(pairs)} pairs have equal ranges already"
            )
        for pair in pairs:
            assert pair.producer is not None
            text = f"equalized with {pair.producer.path}"
            for consumer in pair.consumers:
                add_note(gm, self.name, consumer.site.path, text)
        return gm

    def _is_pair(self, group: ScaleGroup) -> bool:
        if group.producer is None or group.producer.kind != "rows":
            return False
        specs = (self.scheme.spec_for(c.site.path, c.site.role) for c in group.consumers)
        return any(spec.weight is not None for spec in specs)


def _equalize(gm: GraphModule, pair: ScaleGroup) -> float:
    """Rescale one pair; the largest |s - 1|."""
    assert pair.producer is not None
    weight, _ = linear_parameters(gm.get_submodule(pair.producer.path))
    scale = equalizing_scales(weight.abs().amax(1).float(), weight_maxima(gm, pair))
    rescale(gm, pair, scale, Equalize.name)
    return float((scale - 1).abs().max())


def equalizing_scales(rows: Tensor, columns: Tensor) -> Tensor:
    """``sqrt(rows / columns)``, float32 [channels]; 1 where either range is 0."""
    used = (rows > 0) & (columns > 0)
    return torch.where(used, (rows / columns.where(used, torch.ones(()))).sqrt(), 1.0)
