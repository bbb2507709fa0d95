"""equalize: give both sides of a pair of linears the same range, channel by channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.ir.graph import Level, linear_parameters
from fxquant.passes.smooth import weight_maxima
from fxquant.pipeline.context import Context
from fxquant.pipeline.options import Positive, Rounds
from fxquant.pipeline.repair import Repair
from fxquant.schemes.scheme import Scheme
from fxquant.structure.absorption import ScaleGroup, scale_groups
from fxquant.structure.outcome import Blocked, Changed, Outcome
from fxquant.structure.rescaling import rescale


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
    no_place = "quantizes no linear that gets its input from the rows of another one"

    iterations: Rounds = 20
    threshold: Positive = 1e-3

    @property
    def keeps_site_outputs(self) -> bool:
        return False

    def apply(self, gm: GraphModule, context: Context) -> Iterator[Outcome]:
        pairs = [group for group in scale_groups(gm) if _is_pair(group, context.scheme)]
        largest = [0.0] * len(pairs)
        for _ in range(self.iterations):
            changes = [_equalize(gm, pair) for pair in pairs]
            largest = [max(pair) for pair in zip(largest, changes, strict=True)]
            if max(changes, default=0.0) <= self.threshold:
                break
        for pair, change in zip(pairs, largest, strict=True):
            assert pair.producer is not None
            done: Changed | Blocked = Changed(f"equalized with {pair.producer.path}")
            if change <= self.threshold:
                done = Blocked(f"its ranges equal those of {pair.producer.path} already")
            for consumer in pair.consumers:
                yield consumer.site.path, done


def _is_pair(group: ScaleGroup, scheme: Scheme) -> bool:
    if group.producer is None or group.producer.kind != "rows":
        return False
    specs = (scheme.spec_for(c.site.path, c.site.role) for c in group.consumers)
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
    return torch.where(used, (rows / columns.where(used, 1.0)).sqrt(), 1.0)
