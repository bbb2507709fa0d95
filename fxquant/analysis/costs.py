"""What a choice at a site costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxquant.ir.graph import Site
from fxquant.schemes.specs import SiteSpec, TensorSpec

Cost = Callable[[Site, SiteSpec], float]
FLOAT_BITS = 16  # what an operand in float counts as: half precision


def storage(site: Site, spec: SiteSpec) -> float:
    """Stored bits of the site's weight: codes (4 or 8 bits), scales, int32 zero points."""
    rows, columns = site.shape
    if spec.weight is None:
        return float(FLOAT_BITS * rows * columns)
    width = 4 if spec.weight.grid.packed else 8
    return float(width * rows * columns + _scales(site, spec.weight))


def _scales(site: Site, spec: TensorSpec) -> int:
    rows, columns = site.shape
    groups = -(-columns // spec.group_size) if spec.group_size else 1
    count = 1 if spec.granularity == "tensor" else rows * groups
    shared = 32 if spec.scale.two_level else 0
    return count * (spec.scale.bits + (32 if spec.grid.has_zero_point else 0)) + shared


def bits(site: Site, spec: SiteSpec) -> float:
    """Bits of both operands of every product: the weight's stored bits and the activation's."""
    rows, columns = site.shape
    activation = FLOAT_BITS if spec.activation is None else spec.activation.tensor.grid.bits
    return storage(site, spec) + activation * rows * columns


COSTS: dict[str, Cost] = {"bits": bits, "storage": storage}
IN_WORDS = {
    "bits": "bits a weight, those of the input that it multiplies included",
    "storage": "stored bits a weight",
}


def mean_cost(cost: Cost, assignment: Sequence[tuple[Site, SiteSpec]]) -> float:
    """Cost per weight over all sites."""
    weights = sum(site.shape[0] * site.shape[1] for site, _ in assignment)
    return sum(cost(site, spec) for site, spec in assignment) / weights
