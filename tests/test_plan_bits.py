"""plan under a budget of bits: the limit holds, and nothing that keeps it is better by the sums."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import fxquant
from fxquant.analysis.costs import storage
from fxquant.analysis.knapsack import best_within
from fxquant.analysis.plan_result import Plan
from fxquant.analysis.planning import PlanRequest, make_plan
from fxquant.analysis.upgrades import Rung
from fxquant.cli.main import main
from fxquant.errors import BudgetError, SchemeError
from fxquant.evaluation import evaluate
from fxquant.ir.graph import info, linear_sites
from fxquant.ir.size import bits_per_weight
from fxquant.schemes.scheme import Scheme
from tests.architectures import token_ids
from tests.kills import interrupt_store
from tests.models import SMALL_OPT, small_opt
from tests.test_plan import text_windows
from tests.test_tracing import traced

FORMATS = ("we2m1-g32-e8m0-rceil", "we2m1-g16-e4m3", "w4-g32", "we4m3", "w8")
Points = list[list[tuple[int, int]]]
POINTS = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.integers(-20, 99)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def rungs(points: Points) -> dict[str, list[Rung]]:
    return {
        f"site {i}": [Rung(str(j), float(c), float(e)) for j, (c, e) in enumerate(each)]
        for i, each in enumerate(points)
    }


def total(points: Points, chosen: dict[str, str]) -> tuple[int, int]:
    taken = [each[int(chosen[f"site {i}"])] for i, each in enumerate(points)]
    return sum(cost for cost, _ in taken), sum(effect for _, effect in taken)


@given(POINTS, st.integers(0, 45))
@settings(max_examples=200, deadline=None)
def test_the_choice_is_the_best_of_all(points: Points, limit: int) -> None:
    sums = [
        (sum(cost for cost, _ in each), sum(effect for _, effect in each))
        for each in itertools.product(*points)
    ]
    fitting = [effect for cost, effect in sums if cost <= limit]
    found = best_within(rungs(points), limit)
    if found is None:
        assert not fitting
        return
    cost, effect = total(points, found)
    assert cost <= limit
    assert effect == min(fitting)


@given(POINTS, st.integers(0, 45))
@settings(max_examples=100, deadline=None)
def test_few_sums_keep_the_limit_all_the_same(points: Points, limit: int) -> None:
    found = best_within(rungs(points), limit, most=2)
    assert (found is None) == (sum(min(each)[0] for each in points) > limit)
    if found is not None:
        assert total(points, found)[0] <= limit


def test_many_sites_are_close_to_the_bound() -> None:
    """The lower convex hull bounds what any choice can do: 200 sites lose little to it."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(1, 9, (200,), generator=generator).tolist()
    effects = torch.rand((200, 3), generator=generator).double().sort(descending=True).values
    candidates = {
        str(i): [
            Rung(str(j), size * bits, float(effects[i, j]))
            for j, bits in enumerate((4.25, 4.5, 8.0))
        ]
        for i, size in enumerate(sizes)
    }
    limit = 5.5 * sum(sizes)
    found = best_within(candidates, limit)
    assert found is not None
    cost = sum(rungs[int(found[i])].cost for i, rungs in candidates.items())
    effect = sum(rungs[int(found[i])].effect for i, rungs in candidates.items())
    assert cost <= limit
    bound = max(  # Lagrange: least effect + price * cost, less price * limit, for any price
        sum(min(r.effect + price * r.cost for r in rungs) for rungs in candidates.values())
        - price * limit
        for price in torch.logspace(-3, 0, 60, dtype=torch.float64).tolist()
    )
    assert bound <= effect + 1e-9
    assert effect - bound < 0.02 * effect


def planned(bits: float, choices: tuple[str, ...] = FORMATS, **asked: Any) -> Plan:
    graph = fxquant.trace(small_opt()[0])
    data = text_windows(1)
    return make_plan(graph, PlanRequest(data=data, bits=bits, choices=choices, **asked))


def test_bits_are_kept_with_their_scales_and_more_lose_less() -> None:
    graph, data = fxquant.trace(small_opt()[0]), text_windows(1)
    floating, deltas = evaluate(graph, data).loss, []
    for bits in (4.3, 4.6, 5.5):
        found = planned(bits)
        qmodel = fxquant.convert(graph, found.scheme)
        assert found.cost == pytest.approx(bits_per_weight(qmodel))
        assert found.cost <= bits
        assert found.bits == bits
        assert found.budget is None
        assert evaluate(qmodel, data).loss - floating == pytest.approx(found.delta_loss, abs=1e-5)
        for each in found.everywhere:
            assert found.delta_loss <= each.delta_loss + 1e-5
            assert each.cost <= bits
        deltas.append(found.delta_loss)
    assert deltas == sorted(deltas, reverse=True)
    assert len(found.counts) > 1  # really mixed
    text = str(found)
    assert f"{found.cost:.2f} stored bits a weight with scales, of at most 5.5;" in text
    assert "one choice everywhere: we2m1-g32-e8m0-rceil " in text
    assert "of at most +" not in text


def test_what_a_single_choice_takes_is_enough_for_it() -> None:
    """A mean that was divided is given back as a budget."""
    _, graph = traced("llama")
    choices, ids = ("we2m1-g16-e4m3", "w8"), token_ids(1, 20)
    costs = {c: bits_per_weight(fxquant.convert(graph, c)) for c in choices}
    found = make_plan(graph, PlanRequest(data=ids, bits=costs[choices[0]], choices=choices))
    assert found.counts == {choices[0]: 14}
    assert found.cheapest_delta_loss == found.everywhere[0].delta_loss
    with pytest.raises(BudgetError, match=r"no plan keeps .* the cheapest at each site take \d"):
        make_plan(graph, PlanRequest(data=ids, bits=costs[choices[0]] - 1e-3, choices=choices))


def test_one_scale_for_a_whole_tensor_does_not_take_a_format_beyond_its_bits() -> None:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    graph, ids = fxquant.trace(LlamaForCausalLM(config)), token_ids(1, 8)
    choices = ("we2m1-g16-e4m3", "w4-g16-e4m3", "w4-g128")
    found = make_plan(graph, PlanRequest(data=ids, bits=4.5, choices=choices))
    assert [each.choice for each in found.everywhere] == list(choices)
    assert 4.5 < found.everywhere[0].cost < 4.5005
    found = make_plan(graph, PlanRequest(data=ids, bits=4.5, choices=choices[:2]))
    assert found.cost < 4.5005  # not even the cheapest are within 4.5 to the last digit
    with pytest.raises(BudgetError, match=r"take 4\.500[0-9], scales included"):
        make_plan(graph, PlanRequest(data=ids, bits=4.499, choices=choices[:2]))


def test_no_choice_of_all_is_better_by_the_measured_effects() -> None:
    """Every one of 2^12 assignments: what is found has the least sum of effects measured alone,
    or is one choice everywhere that loses less with all sites together."""
    _, graph = traced("opt")
    ids, choices, limit = token_ids(2, 24), ("w3-g8", "w8"), 9.0
    floating = evaluate(graph, ids).loss
    sites = [site for site, _ in linear_sites(fxquant.convert(graph, "fp", level="float"))]
    sites = [site for site in sites if site.role == "linear"]
    assert len(sites) == 12
    specs = [Scheme.parse(choice).spec for choice in choices]
    costs = [[storage(site, spec) for spec in specs] for site in sites]
    effects = [[_alone(graph, ids, site.path, c) - floating for c in choices] for site in sites]
    weights = sum(site.shape[0] * site.shape[1] for site in sites)
    found = make_plan(graph, PlanRequest(data=ids, bits=limit, choices=choices))
    best = min(
        (
            taken
            for taken in itertools.product(range(2), repeat=12)
            if sum(c[t] for c, t in zip(costs, taken, strict=True)) <= limit * weights
        ),
        key=lambda taken: sum(e[t] for e, t in zip(effects, taken, strict=True)),
    )
    expected = {s.path: choices[t] for s, t in zip(sites, best, strict=True)}
    chosen = {s.path: str(Scheme(found.scheme.spec_for(s.path, s.role))) for s in sites}
    if chosen != expected:
        (single,) = set(chosen.values())
        losses = {each.choice: each.delta_loss for each in found.everywhere}
        mixed = Scheme(
            specs[0], overrides=tuple((p, Scheme.parse(c).spec) for p, c in expected.items())
        )
        assert losses[single] < evaluate(fxquant.convert(graph, mixed), ids).loss - floating


def _alone(graph: Any, ids: torch.Tensor, path: str, choice: str) -> float:
    scheme = Scheme(overrides=((path, Scheme.parse(choice).spec),))
    return evaluate(fxquant.convert(graph, scheme), ids).loss


def test_an_interrupted_plan_goes_on_and_another_limit_takes_its_effects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = planned(5.0)
    kept = interrupt_store(monkeypatch, after=40)
    with pytest.raises(KeyboardInterrupt):
        planned(5.0, output=tmp_path)
    resumed = planned(5.0, output=tmp_path)
    assert (resumed.scheme, resumed.delta_loss) == (whole.scheme, whole.delta_loss)
    first = len(kept)
    planned(4.4, output=tmp_path)
    assert not [name for name in kept[first:] if name.startswith("alone")]


def test_one_budget_is_given() -> None:
    _, graph = traced("opt")
    wishes: tuple[dict[str, Any], ...] = ({}, {"budget": 1, "bits": 5})
    for wish in wishes:
        with pytest.raises(SchemeError, match=r"either budget=.* or bits="):
            fxquant.plan(graph, data=token_ids(1, 8), **wish)
    for bits in (0, -1, float("nan"), float("inf")):
        with pytest.raises(SchemeError, match="finite number of bits above 0"):
            fxquant.plan(graph, data=token_ids(1, 8), bits=bits)


def test_the_cost_may_count_inputs_too() -> None:
    _, graph = traced("opt")
    choices = ("mxfp8", "mxfp4", "w4-g32", "fp")
    found = make_plan(
        graph, PlanRequest(data=token_ids(1, 20), bits=16.5, choices=choices, cost="bits")
    )
    assert found.cost_name == "bits"
    assert found.cost <= 16.5
    costs = {each.choice: each.cost for each in found.everywhere}
    assert costs == {str(Scheme.parse("mxfp8")): 16.5, str(Scheme.parse("mxfp4")): 8.5}


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", str(SMALL_OPT), "--windows", "1", "--length", "48"]
    command += ["--calibration-windows", "0", "--held-out-windows", "1", "--output", str(tmp_path)]
    assert main([*command, "--bits", "4.5"]) == 0
    printed, said = capsys.readouterr()
    assert "plan: a budget of 4.5 stored bits a weight on 1 window of 48 tokens" in said
    assert "more where the first plans miss" not in said
    assert "stored bits a weight with scales, of at most 4.5;" in printed
    data = json.loads((tmp_path / "plan.json").read_text())
    assert (data["budget"], data["bits"], data["cost_name"]) == (None, 4.5, "storage")
    assert data["cost"] <= 4.5
    assert all(each["cost"] <= 4.5 for each in data["everywhere"])
    scheme = Scheme.parse((tmp_path / "scheme.json").read_text())
    made_by = json.loads((tmp_path / "scheme.json").read_text())["made_by"]
    assert made_by["bits"] == 4.5
    assert "we2m1-g16-e4m3" in made_by["choices"]
    qmodel = fxquant.convert(small_opt()[0], scheme)
    assert bits_per_weight(qmodel) == pytest.approx(data["cost"])
    assert len(info(qmodel).sites) > 0
