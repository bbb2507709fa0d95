"""Random schemes over all grids: read back, converted, codes of their grid, logits of a reference.

What is not converted has to be refused by one of fxquant's errors; any other is a failure.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.errors import FxquantError
from fxquant.formats.integer import IntegerGrid
from fxquant.formats.scales import FP32
from fxquant.formats.table import GRIDS, SCALES
from fxquant.ir.graph import info
from fxquant.ir.leaves import QuantizedParameters
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import ActivationSpec, Estimator, Granularity, SiteSpec, TensorSpec
from tests.architectures import llama, token_ids
from tests.grid_reference import reference

IDS = token_ids(2, 9)
SIZES = (1, 5, 8, 16, 32, 100)


def tensor(
    r: random.Random, grains: tuple[Granularity, ...], asymmetric: bool = True
) -> TensorSpec:
    grids = [grid for grid in GRIDS.values() if asymmetric or not grid.has_zero_point]
    grid, grain = r.choice(grids), r.choice(grains)
    if grain != "group":
        return TensorSpec(grid, grain)
    kept = [FP32] if grid.has_zero_point else list(SCALES.values())
    if isinstance(grid, IntegerGrid) or grid.name == "nf4":
        kept = [each for each in kept if "even" not in each.name]
    return TensorSpec(grid, "group", r.choice(SIZES), r.choice(kept))


def scheme(r: random.Random) -> Scheme:
    weight, activation = tensor(r, ("tensor", "channel", "group")), None
    kind = r.random()
    if kind < 0.15:
        activation = ActivationSpec(tensor(r, ("tensor",), False), Estimator("absmax"))
    elif kind < 0.55:
        activation = ActivationSpec(tensor(r, ("tensor", "token")))
    elif kind < 0.8:
        activation = ActivationSpec(tensor(r, ("group",), False))
    return Scheme(SiteSpec(weight, activation))


def valid_codes(gm: torch.fx.GraphModule, spec: TensorSpec) -> bool:
    """Whether every weight's codes stand for numbers of its grid."""
    for site in info(gm).sites:
        module = gm.get_submodule(site.path)
        if isinstance(module, QuantizedParameters):
            codes = spec.grid.unpack(module.get_buffer("weight"), site.shape[1])
            if tuple(codes.shape) != site.shape or not spec.grid.valid(codes):
                return False
    return True


@torch.no_grad()
def check(drawn: Scheme, model: torch.fx.GraphModule, plain: Tensor) -> str:
    """How it went: "right", or "refused" where there is one clear error."""
    text = str(drawn)
    assert Scheme.parse(text) == drawn, text
    try:
        graph = fxquant.convert(model, text, calibration=[IDS])
    except FxquantError:
        return "refused"
    assert info(graph).scheme == text
    assert drawn.spec.weight is not None
    assert valid_codes(graph, drawn.spec.weight), text
    wanted, found = reference(text, IDS), graph(IDS)
    assert bool(found.isfinite().all()), text
    # Both compute in float64 between the codes, so that codes hardly ever fall apart; but a zero
    # point next to a middle may be another one, being computed in float32, and moves its group.
    affine = any(each.grid.has_zero_point for each in (drawn.spec.weight, *inputs(drawn.spec)))
    share = 0.6 if affine else 0.05
    bound = share * float((wanted - plain).norm()) + 1e-5 * float(plain.norm())
    assert float((found - wanted).norm()) <= bound, text
    return "right"


def inputs(spec: SiteSpec) -> list[TensorSpec]:
    return [] if spec.activation is None else [spec.activation.tensor]


def run(count: int) -> dict[str, int]:
    r, model = random.Random(), llama().double()
    graph, plain = fxquant.trace(model), model(input_ids=IDS).logits.detach()
    found = {"right": 0, "refused": 0}
    for _ in range(count):
        found[check(scheme(r), graph, plain)] += 1
    return found


def test_a_hundred_random_schemes() -> None:
    found = run(100)
    assert found["right"] > 90


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_five_thousand_random_schemes() -> None:
    found = run(5000)
    assert found["right"] > 4500
