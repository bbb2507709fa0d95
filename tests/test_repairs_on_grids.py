"""Every repair on grids that are no integer's: right by a plain reference, or a refusal."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import FxquantError
from fxquant.ir.graph import info
from fxquant.ir.leaves import QuantizedParameters
from fxquant.numerics.weight_codes import WeightCodes
from fxquant.recipes.repairs import REPAIRS
from fxquant.schemes.scheme import Scheme
from tests.architectures import llama, token_ids
from tests.grid_reference import coded

BATCHES = [token_ids(4, 20, seed=5), token_ids(4, 20, seed=6)]
IDS = token_ids(4, 20, seed=9)
SPELLED = {
    "split_outliers": "split_outliers(threshold=2.5)",
    "attn8": "attn8(format=fp8)",
    "kv8": "kv8(format=fp8)",
}
OF_INPUTS = ("smooth", "split_outliers")
FEW = ("nvfp4", "fp8-static")
MORE = (
    *("fp8", "mxfp4-rceil", "wmxfp4", "wnf4-g16", "mxfp6-even", "we3m2-tensor/ae5m2-dynamic"),
    *("we2m1-g16-e8m0/a8-dynamic-token", "w4-g16-e8m0/a8-dynamic-g12"),
    "w3-g8-asym/ae2m3-dynamic-g4",
)


@functools.cache
def traced() -> torch.fx.GraphModule:
    return fxquant.trace(llama())


@torch.no_grad()
def logits(scheme: str, level: str = "integer") -> Tensor:
    found: Tensor = fxquant.convert(traced(), scheme, calibration=BATCHES, level=level)(IDS)
    return found


@functools.cache
def plain() -> Tensor:
    return logits("fp")


@functools.cache
def unrepaired(scheme: str) -> float:
    return float((logits(scheme) - plain()).norm())


def check(scheme: str, repair: str) -> None:
    text = f"{scheme}+{SPELLED.get(repair, repair)}"
    if repair in OF_INPUTS and Scheme.parse(scheme).spec.activation is None:
        with pytest.raises(FxquantError, match=f"{repair} had no effect.*quantizes no activation"):
            logits(text)
        return
    found = logits(text)
    assert bool(found.isfinite().all()), text
    error = float((found - plain()).norm())
    # Random weights have nothing to repair; a repair that broke a grid would lose far more.
    assert error < 1.5 * unrepaired(scheme) + 0.02 * float(plain().norm()), text
    # Coarse codes flip behind sums in another order.
    assert float((found - logits(text, "qdq")).norm()) < 0.1 * error, text


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("scheme", FEW)
def test_a_repair_works_or_says_why_not(scheme: str, repair: str) -> None:
    check(scheme, repair)


@pytest.mark.slow
@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("scheme", MORE)
def test_a_repair_works_on_the_other_grids(scheme: str, repair: str) -> None:
    check(scheme, repair)


@torch.no_grad()
@pytest.mark.parametrize("repair", ["gptq", "refine", "clip", "awq(scale=false)"])
@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "wnf4-g16"])
def test_chosen_codes_compute_what_they_stand_for(scheme: str, repair: str) -> None:
    """A float64 model with the values of the graph's codes as weights, inputs rounded plainly."""
    graph = fxquant.convert(traced(), f"{scheme}+{repair}", calibration=BATCHES)
    nearest = fxquant.convert(traced(), scheme)
    model, spec, changed = llama().double(), Scheme.parse(scheme).spec, 0
    assert spec.weight is not None
    for site in info(graph).sites:
        stored = graph.get_submodule(site.path)
        if not isinstance(stored, QuantizedParameters):
            continue
        codes = WeightCodes.read(dict(stored.named_buffers()), spec.weight, site.shape[1])
        assert spec.weight.grid.valid(codes.codes)
        values = spec.weight.grid.decode(codes.codes).double()
        size = spec.weight.group_size or site.shape[1]
        scales = codes.scales.double().repeat_interleave(size, -1)[:, : site.shape[1]]
        layer = model.get_submodule(site.path)
        assert isinstance(layer, nn.Linear)
        layer.weight.data = values * scales
        before = nearest.get_submodule(site.path)
        assert isinstance(before, QuantizedParameters)
        changed += not torch.equal(stored.get_buffer("weight"), before.get_buffer("weight"))
        if spec.activation is not None:
            own = spec.activation.tensor
            layer.register_forward_pre_hook(lambda _, args, own=own: (coded(args[0], own),))
    assert changed > 2
    wanted, found = model(input_ids=IDS).logits, graph(IDS)
    noise = float((wanted - plain()).norm())
    assert float((found.double() - wanted).norm()) < 0.1 * noise
