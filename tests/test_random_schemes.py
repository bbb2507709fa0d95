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
from fxquant.formats.table import GRIDS, SCALES
from fxquant.ir.graph import info, is_op
from fxquant.ir.leaves import QuantizedParameters
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.run.execution import Executor
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import ActivationSpec, Estimator, Granularity, SiteSpec, TensorSpec
from tests.architectures import llama, token_ids
from tests.grid_reference import ROUNDINGS, Arriving, reference

IDS = token_ids(2, 9)
SIZES = (1, 5, 8, 16, 32, 100)


def tensor(
    r: random.Random, grains: tuple[Granularity, ...], asymmetric: bool = True
) -> TensorSpec:
    grids = [grid for grid in GRIDS.values() if asymmetric or not grid.has_zero_point]
    grid, grain = r.choice(grids), r.choice(grains)
    if grain != "group":
        return TensorSpec(grid, grain)
    kept = [each for each in SCALES.values() if each.zero_points or not grid.has_zero_point]
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
    found, inputs = run_graph(graph)
    # The reference is handed the graph's own inputs where they are quantized, so that all codes
    # are the same, and float32 sums are the one difference left.
    wanted = reference(text, IDS, Arriving(inputs, text) if drawn.spec.activation else None)
    assert bool(found.isfinite().all()), text
    assert float((found - wanted).norm()) <= ROUNDINGS * float(plain.norm()), text
    return "right"


def run_graph(graph: torch.fx.GraphModule) -> tuple[Tensor, list[Tensor]]:
    """The logits, and what each quantizer of activations reads, one after the other."""
    values: dict[torch.fx.Node, Tensor] = {}
    logits = Executor(graph).run(lambda node, value: values.setdefault(node, value), input_ids=IDS)
    read = dict.fromkeys(
        operands(node).x
        for node in graph.graph.nodes
        if is_op(node, OPS.quantize.default) or is_op(node, OPS.quantize_to.default)
    )
    return logits, [values[node] for node in read]


def run(count: int) -> dict[str, int]:
    r, model = random.Random(torch.initial_seed()), llama().double()
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
