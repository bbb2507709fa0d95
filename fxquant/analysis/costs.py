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
    times = 1 if spec.weight.granularity == "tensor" else rows
    shared = 32 if spec.weight.scale.two_level else 0
    return float(width * rows * columns + times * _scales(columns, spec.weight) + shared)


def _scales(columns: int, spec: TensorSpec) -> int:
    """Bits of the scales and zero points of a row, or of a whole tensor that has one of each."""
    groups = -(-columns // spec.group_size) if spec.group_size else 1
    return groups * (spec.scale.bits + (32 if spec.grid.has_zero_point else 0))


def bits(site: Site, spec: SiteSpec) -> float:
    """Bits of both operands of every product: the weight's stored bits, and those of the input that
    it multiplies, with the scales of its tokens or groups."""
    rows, columns = site.shape
    if spec.activation is None:
        return storage(site, spec) + FLOAT_BITS * rows * columns
    tensor = spec.activation.tensor
    scales = 0 if tensor.granularity == "tensor" else _scales(columns, tensor)
    return storage(site, spec) + rows * (tensor.grid.bits * columns + scales)


COSTS: dict[str, Cost] = {"bits": bits, "storage": storage}
IN_WORDS = {
    "bits": "bits a weight, those of the input that it multiplies included",
    "storage": "stored bits a weight",
}


def mean_cost(cost: Cost, assignment: Sequence[tuple[Site, SiteSpec]]) -> float:
    """Cost per weight over all sites."""
    weights = sum(site.shape[0] * site.shape[1] for site, _ in assignment)
    return sum(cost(site, spec) for site, spec in assignment) / weights
