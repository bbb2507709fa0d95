"""Models changed at random agree with a plain module swap in float64, or are refused truly."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import fxquant
from fxquant.errors import FxquantError
from fxquant.ir.graph import info
from tests import reference
from tests.architectures import padding_mask, token_ids
from tests.attack.conftest import SeedOf
from tests.attack.models import Mutant, mutant
from tests.reference import PLAIN, PlainLinear, input_ranges, linears_of
from tests.test_reference import FLIPPED, SAME_CODES, run_with_codes

SCHEMES = ("w8", "w8a8-dynamic-token", "w8a8-static:absmax")


def batches() -> list[dict[str, Tensor]]:
    return [
        {"input_ids": token_ids(3, 14, seed), "attention_mask": padding_mask(3, 14, "left")}
        for seed in (7, 8)
    ]


def swapped(made: Mutant, scheme: str) -> PreTrainedModel:
    """``reference.swap``, but for the linears that stay float."""
    model = copy.deepcopy(made.model).eval()
    ranges = input_ranges(model, batches())  # and weights that each call computes are fresh
    for name, linear in linears_of(model).items():
        if name in made.floats:
            continue
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor)
        conv1d = isinstance(linear, Conv1D)
        plain = PlainLinear(weight.T if conv1d else weight, bias, PLAIN[scheme])  # type: ignore[arg-type]
        plain.range = ranges[name]
        model.set_submodule(name, plain)
    return model


def expected_sites(made: Mutant) -> set[str]:
    return set(linears_of(made.model)) - made.floats


def take_ties(plain: PreTrainedModel, qmodel: GraphModule, what: str) -> None:
    """Let the reference round as fxquant does where w / scale is a tie but for float32's rounding:
    by one step, at most at one weight of a layer or in ten thousand; bfloat16 weights, which have
    256 mantissas, tie more often."""
    coarse = next(plain.parameters()).dtype == torch.bfloat16
    for name, module in plain.named_modules():
        if isinstance(module, PlainLinear):
            held = qmodel.get_submodule(name)
            scale = held.get_buffer("weight_scale").double()
            ours = held.get_buffer("weight").double() * scale
            steps = (ours - module.weight).abs() / scale
            assert float(steps.max()) <= 1 + 1e-4, what
            assert int((steps > 0.5).sum()) <= max(1, (1e-2 if coarse else 1e-4) * steps.numel()), (
                what
            )
            module.weight = torch.where(steps > 0.5, ours, module.weight)


@torch.no_grad()
def outcome(seed: int, frontend: str = "auto") -> str:
    """ "right" or "refused"; AssertionError for what is neither."""
    made = mutant(seed)
    what = f"seed {seed}: {', '.join(made.done)}"
    training = [module.training for module in made.model.modules()]
    try:
        graph = fxquant.trace(made.model, frontend)
    except FxquantError as error:
        said = str(error)
        assert any(re.search(reason, said) for reason in made.refusals), f"{what}: {said}"
        return "refused"
    assert [module.training for module in made.model.modules()] == training, what
    assert not made.refusals, f"{what}: not refused"
    made.model.eval()
    inputs = {"input_ids": token_ids(3, 17, seed=3)}
    unquantized = made.model(**inputs).logits.double()
    eps = torch.finfo(next(made.model.parameters()).dtype).eps
    allowed = max(SAME_CODES, 30 * eps) * float(unquantized.norm())
    for scheme in SCHEMES:
        qmodel = fxquant.convert(graph, scheme, calibration=batches())
        sites = {site.path for site in info(qmodel).sites if site.role == "linear"}
        assert sites == expected_sites(made), f"{what}: {sites ^ expected_sites(made)}"
        plain = swapped(made, scheme)
        take_ties(plain, qmodel, what)
        wanted = plain(**inputs).logits.double()
        assert float((wanted - unquantized).norm()) > 1e-3 * float(unquantized.norm())
        given = reference.codes(plain)
        found, flips = run_with_codes(qmodel, given, inputs)
        difference = float((found.double() - wanted).norm())
        assert difference <= allowed, f"{what}: {scheme}: {difference:.3g} > {allowed:.3g}"
        if eps < 1e-5:
            flipped = sum(count for count, _ in flips.values())
            assert flipped <= max(2, FLIPPED * sum(map(torch.numel, given.values()))), what
            # A unit in the last place of bfloat16 is half a step at code 127.
            assert all(step <= 1 for _, step in flips.values()), what
    return "right"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(12))
def test_a_mutated_model_is_right_or_refused(seed: int, seed_of: SeedOf) -> None:
    outcome(seed_of(0) + seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("frontend", ["auto", "recorder"])
def test_two_hundred_mutated_models(
    frontend: str, capsys: pytest.CaptureFixture[str], seed_of: SeedOf
) -> None:
    seeds = range(seed_of(100), seed_of(100) + 200)
    found, wrong = [], []
    for seed in seeds:
        try:
            found.append(outcome(seed, frontend))
        except AssertionError as error:
            wrong.append(str(error))
    with capsys.disabled():
        print(
            f"\n{frontend}: tried {len(seeds)}, right {found.count('right')}, refused with a true "
            f"reason {found.count('refused')}, wrong {len(wrong)}"
        )
    assert not wrong, "\n".join(wrong)
    assert found.count("refused") < len(seeds) / 3
