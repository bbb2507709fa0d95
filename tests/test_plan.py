"""plan: the budget holds on the converted model, and more budget costs less."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxquant
from fxquant.analysis import plan
from fxquant.analysis.costs import bits, mean_cost, storage
from fxquant.analysis.plan_result import Measured, Plan
from fxquant.analysis.planning import PlanRequest, make_plan
from fxquant.analysis.search import fewest
from fxquant.analysis.upgrades import Rung, order_upgrades, rungs_of
from fxquant.cli.main import main
from fxquant.errors import BudgetError, CalibrationError, DataError, SchemeError
from fxquant.evaluation import cut_windows, evaluate, load_text
from fxquant.evaluation.models import LoadedModel, load_model
from fxquant.ir.graph import Site
from fxquant.ir.size import bits_per_weight
from fxquant.schemes.scheme import Scheme
from tests.architectures import token_ids
from tests.kills import interrupt_store
from tests.models import SMALL_OPT, small_opt
from tests.test_tracing import traced

CHOICES = ("w2", "w4-g32-asym", "w8", "fp")


def text_windows(count: int) -> Tensor:
    return cut_windows(
        load_text("builtin"), small_opt()[1], count=count, length=96, calibration=0, seed=0
    ).evaluation


def test_the_budget_holds_on_the_converted_model() -> None:
    model, _ = small_opt()
    data = text_windows(2)
    graph = fxquant.trace(model)
    floating = evaluate(graph, data).loss
    costs = []
    for budget in (0.01, 0.3):
        found = make_plan(
            graph, PlanRequest(data=data, budget=budget, choices=CHOICES, cost="storage")
        )
        assert found.cheapest_delta_loss > budget  # else there was nothing to plan
        scheme = Scheme.parse(str(found.scheme))
        assert scheme == found.scheme
        qmodel = fxquant.convert(graph, scheme)
        assert evaluate(qmodel, data).loss - floating <= budget
        assert evaluate(qmodel, data).loss - floating == pytest.approx(found.delta_loss, abs=1e-5)
        assert len(found.counts) > 1  # really mixed
        assert sum(found.counts.values()) == 24
        costs.append(found.cost)
        if "fp" not in found.counts:
            assert found.cost == pytest.approx(bits_per_weight(qmodel))
    assert costs[1] < costs[0]


def test_static_choices_are_calibrated() -> None:
    _, graph = traced("llama")
    choices = ("w4/a4-static", "w8a8-static:absmax", "fp")
    with pytest.raises(CalibrationError):
        plan(graph, data=token_ids(1, 20), budget=1, choices=choices)
    scheme = plan(
        graph,
        data=token_ids(1, 20),
        budget=0.003,
        choices=choices,
        calibration=[token_ids(2, 16, 5)],
    )
    assert isinstance(scheme, Scheme)
    assert json.loads(scheme.to_json())


def test_what_cannot_be_kept_is_said() -> None:
    model, _ = small_opt()
    with pytest.raises(BudgetError, match=r"no plan keeps the budget of \+0\.0000.*w2"):
        plan(model, data=text_windows(1), budget=1e-5, choices=("w2", "w3"))


def test_the_dearest_choice_need_not_be_the_best() -> None:
    """Two bits beside float inputs count more than three bits beside eight, and lose more."""
    model, _ = small_opt()
    data = text_windows(1)
    cheap, good, dear = "w2-tensor/a8-dynamic-token", "w3a8-dynamic-token", "w2-tensor"
    graph = fxquant.trace(model)
    floating = evaluate(graph, data).loss
    loss = {s: evaluate(fxquant.convert(graph, s), data).loss - floating for s in (good, dear)}
    assert 0.01 < 2 * loss[good] < loss[dear]
    found = make_plan(
        graph, PlanRequest(data=data, budget=1.2 * loss[good], choices=(cheap, good, dear))
    )
    assert found.delta_loss <= 1.2 * loss[good]
    assert found.counts[good] > 12
    with pytest.raises(BudgetError, match=r"best that was measured, .*sites w3a8") as error:
        plan(graph, data=data, budget=0, choices=(cheap, good, dear))
    stated = re.search(r"the loss by \+([0-9.]+)", str(error.value))
    assert stated is not None
    assert float(stated[1]) <= 1.1 * loss[good]


def test_a_budget_of_nothing_is_kept_by_float() -> None:
    _, graph = traced("opt")
    found = make_plan(
        graph, PlanRequest(data=token_ids(3, 20), budget=0, choices=("w2-tensor", "fp"))
    )
    assert found.delta_loss <= 0


@pytest.mark.parametrize(("budget", "expected"), [(0.5, 24), (3.5, 21)])
def test_the_search_finds_a_valley(budget: float, expected: int) -> None:
    """Neither end keeps the budget, nor any count that doubling meets."""
    measured: list[int] = []

    def delta(count: int) -> float:
        measured.append(count)
        return abs(count - 24)

    found = fewest(delta, 0, 48, budget)
    assert found == expected
    assert len(measured) < 20
    assert fewest(delta, 30, 48, budget) is None
    assert fewest(delta, 49, 48, budget) is None


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 70))
@settings(max_examples=200, deadline=None)
def test_the_search_is_exact_for_a_falling_loss(first: int, length: int, enough: int) -> None:
    last = first + length
    found = fewest(lambda count: float(enough - count), first, last, 0)
    assert found == (None if enough > last else max(enough, first))


def test_an_interrupted_plan_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph = traced("opt")
    choices = ("w3-tensor", "w4", "w8")
    asked: dict[str, object] = {"data": token_ids(2, 20), "budget": 0.002, "choices": choices}
    whole = make_plan(graph, PlanRequest(**asked))  # type: ignore[arg-type]
    kept = interrupt_store(monkeypatch, after=20)
    with pytest.raises(KeyboardInterrupt):
        make_plan(graph, PlanRequest(output=tmp_path, **asked))  # type: ignore[arg-type]
    resumed = make_plan(graph, PlanRequest(output=tmp_path, **asked))  # type: ignore[arg-type]
    first = len(kept)
    assert resumed.scheme == whole.scheme
    assert resumed.delta_loss == whole.delta_loss
    assert resumed.forwards == pytest.approx(whole.forwards, rel=0.05)
    make_plan(graph, PlanRequest(output=tmp_path, **asked))  # type: ignore[arg-type]
    assert len(kept) == first  # nothing was measured again


def test_the_printout_says_on_what_it_was_measured() -> None:
    scheme = Scheme.parse("w8")
    known = Plan(
        *(scheme, 0.05, 0.04, 0.9, 8.1, "bits", {"w8": 3}, 7.0, 1),
        chosen_on=Measured(0.04, 0.02, 2),
    )
    text = str(known)
    assert "Δloss +0.0400 ± 0.0200 s.e. on 2 windows that it was chosen on, verified" in text
    assert "not measured on windows that had no part in choosing it" in text
    assert "the budget is within one standard error of this Δloss (0.0200)" in text
    sure = replace(known, chosen_on=Measured(0.04, 0.009, 2), held_out=Measured(0.0872, 0.01, 4))
    assert "within one standard error" not in str(sure)
    said = "+0.0872 ± 0.0100 s.e. on 4 windows that had no part in choosing it, 0.0372 above the"
    assert said in str(sure)
    kept = replace(sure, held_out=Measured(0.03, None, 1))
    assert "+0.0300 ± n/a s.e. on 1 window that had no part in choosing it" in str(kept)
    assert "above the budget" not in str(kept)
    one = replace(known, chosen_on=Measured(0.04, None, 1))
    assert "one window gives no standard error" in str(one)


def test_held_out_windows_have_no_part(capsys: pytest.CaptureFixture[str]) -> None:
    _, graph = traced("opt")
    ids = token_ids(5, 20)
    asked: dict[str, Any] = {"data": ids[:2], "budget": 0.002, "choices": ("w3-tensor", "w8")}
    without = plan(graph, **asked)
    assert capsys.readouterr().err == ""
    assert plan(graph, **asked, held_out=ids[2:], progress=True) == without
    said = capsys.readouterr().err.splitlines()
    assert any(re.match(r"plan: Δloss .* on 3 windows that had no part", line) for line in said)
    with pytest.raises(DataError, match="1 of the windows of held_out= are windows of data= too"):
        plan(graph, **asked, held_out=ids[1:])


def test_bad_input() -> None:
    _, graph = traced("opt")
    ids = token_ids(1, 8)
    with pytest.raises(SchemeError, match="unknown cost"):
        plan(graph, data=ids, budget=1, cost="money")
    with pytest.raises(SchemeError, match="at least two"):
        plan(graph, data=ids, budget=1, choices=("w8",))
    with pytest.raises(SchemeError, match="at least 0"):
        plan(graph, data=ids, budget=float("nan"))
    with pytest.raises(SchemeError, match="one site's spec"):
        plan(graph, data=ids, budget=1, choices=("w8+smooth", "fp"))


def test_costs() -> None:
    site = Site("a", "linear", (64, 96))
    specs = {text: Scheme.parse(text).spec for text in ("w8a8-dynamic", "w4-g32-asym", "fp", "w8")}
    assert storage(site, specs["w8"]) / site.shape[0] / 96 == pytest.approx(8 + 32 / 96)
    assert mean_cost(storage, [(site, specs["w4-g32-asym"])]) == pytest.approx(4 + 64 / 32)
    assert mean_cost(bits, [(site, specs["fp"])]) == 32
    assert bits(site, specs["w8a8-dynamic"]) == storage(site, specs["w8"]) + 8 * 64 * 96


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(-20, 99)), min_size=1, max_size=6),
)
@settings(max_examples=200, deadline=None)
def test_rungs_are_the_lower_convex_hull(points: list[tuple[int, int]]) -> None:
    rungs = rungs_of([Rung(str(i), float(c), float(e)) for i, (c, e) in enumerate(points)])
    assert rungs[0].cost == min(c for c, _ in points)
    assert rungs[-1].effect == min(e for _, e in points)
    for left, right in itertools.pairwise(rungs):
        assert right.cost > left.cost
        assert right.effect < left.effect
        # No point lies below the line between two neighbours.
        slope = (right.effect - left.effect) / (right.cost - left.cost)
        for cost, effect in points:
            if left.cost <= cost <= right.cost:
                assert effect >= left.effect + slope * (cost - left.cost) - 1e-9


def test_upgrades_by_gain_and_in_order() -> None:
    steps = {
        "a": [Rung("x", 1, 10), Rung("y", 2, 4), Rung("z", 4, 0)],
        "b": [Rung("x", 1, 5), Rung("z", 2, 1)],
        "c": [Rung("x", 1, 0), Rung("y", 2, 1), Rung("z", 3, -9)],
    }
    assert order_upgrades(steps) == (
        ("a", "y"), ("b", "z"), ("a", "z"), ("c", "y"), ("c", "z"),
    )  # fmt: skip


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str, **options: Any) -> LoadedModel:
        return replace(load_model(str(SMALL_OPT), **options), name=name)

    # As for a package's model, whose directory is of no use to a reader.
    monkeypatch.setattr("fxquant.evaluation.job.load_model", load)
    threads = torch.get_num_threads()
    short = ["--model", "package:small-opt", "--windows", "1", "--length", "48"]
    out = tmp_path / "plan"
    command = ["plan", *short, "--calibration-windows", "0", "--budget", "0.05"]
    assert main([*command, "--choices", *CHOICES, "--output", str(out)]) == 0
    printed, said = capsys.readouterr()
    assert "on 1 window that it was chosen on, verified, of at most +0.0500" in printed
    assert "on 4 windows that had no part in choosing it" in printed
    assert "the first window of 48 tokens" in printed
    assert said.startswith("plan: a budget of +0.0500 on 1 window of 48 tokens: w2, w4-g32-asym")
    assert re.search(r"plan: about \d+ forwards of all windows, [\d.e-]+ s each: about \d+ s", said)
    assert "plan: sites 1 of 24, " in said
    written = json.loads((out / "scheme.json").read_text())
    data = json.loads((out / "plan.json").read_text())
    scheme = Scheme.parse((out / "scheme.json").read_text())
    assert scheme.overrides
    assert written == {**json.loads(scheme.to_json()), "made_by": written["made_by"]}
    made_by = written["made_by"]
    assert made_by["provenance"] == data["provenance"]
    assert made_by["provenance"]["windows"] == 1
    assert made_by["provenance"]["command"].startswith("fxquant plan --model package:small-opt")
    assert (made_by["budget"], made_by["choices"]) == (0.05, list(CHOICES))
    assert made_by["chosen_on"]["delta"] == data["delta_loss"] <= 0.05
    assert made_by["held_out"]["windows"] == 4
    # The held-out windows are those behind the first, and their figure is what evaluate measures.
    ids = cut_windows(
        load_text("builtin"), small_opt()[1], count=5, length=48, calibration=0, seed=0
    ).evaluation[1:]
    graph = fxquant.trace(small_opt()[0])
    losses = [evaluate(each, ids).loss for each in (fxquant.convert(graph, scheme), graph)]
    assert made_by["held_out"]["delta"] == pytest.approx(losses[0] - losses[1], abs=1e-6)
    assert made_by["held_out"]["error"] > 0

    out = tmp_path / "explain"
    command = ["explain", *short, "--calibration-windows", "1", "--scheme", "w8a8-static:p99"]
    assert main([*command, "--sites", "*.fc?", "--output", str(out)]) == 0
    first = capsys.readouterr().out
    assert first.startswith("package:small-opt under w8a8-static:p99 at sites *.fc?")
    assert "Worst sites, by in_order" in first
    data = json.loads((out / "explanation.json").read_text())
    assert data["model"] == "package:small-opt"
    assert str(SMALL_OPT) not in first + json.dumps(data)
    assert {site["kind"] for site in data["sites"]} == {"fc1", "fc2"}
    assert data["provenance"]["windows"] == 1
    assert (out / "report.md").read_text().startswith(first[:200])
    kept = next(out.glob("losses-*.jsonl")).read_text()
    assert main([*command, "--sites", "*.fc?", "--output", str(out)]) == 0
    assert next(out.glob("losses-*.jsonl")).read_text() == kept  # nothing was run again
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    for site in data["sites"]:
        assert site["site"] in page
    assert main([*command, "--sites", "nowhere"]) == 2
    assert "covers no site" in capsys.readouterr().err
    assert torch.get_num_threads() == threads
