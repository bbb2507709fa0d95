"""explain: exact identities, planted faults, resume, refusals."""

from __future__ import annotations

import copy
import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import fxquant
from benchmarks.outliers import OutlierPlan, plant_outliers
from fxquant.analysis import explain
from fxquant.analysis.causes import causes_of, shapley
from fxquant.analysis.effects import EFFECTS
from fxquant.analysis.parts import CAUSES, Cause, subsets
from fxquant.analysis.path import first_order, gauss_legendre, integrate
from fxquant.analysis.report import Explanation
from fxquant.analysis.sites import LinearSite
from fxquant.analysis.store import Loss, fingerprint
from fxquant.analysis.validation import agreement, shared_draw, spearman
from fxquant.errors import CalibrationError, DataError, SchemeError
from fxquant.evaluation import cut_windows, load_text
from fxquant.formats.integer import integer
from fxquant.ir.graph import install, linear_parameters, update_info
from fxquant.ir.leaves import CodedLinear
from fxquant.numerics.weight_codes import min_max_codes
from fxquant.run.loss import token_nll
from fxquant.schemes.specs import TensorSpec
from tests.architectures import ARCHITECTURES, VOCABULARY, token_ids
from tests.kills import interrupt_store
from tests.models import small_opt
from tests.test_analysis_parts import laboratory
from tests.test_tracing import traced

EVERYTHING = (*EFFECTS, "causes", "path", "first_order", "rescue:blocks", "in_order:kinds")


@functools.cache
def windows() -> tuple[Tensor, Tensor]:
    """Two windows of 96 tokens for the small OPT, and two more to calibrate."""
    cut = cut_windows(
        load_text("builtin"), small_opt()[1], count=2, length=96, calibration=2, seed=0
    )
    return cut.evaluation, cut.calibration


def explain_small(model: PreTrainedModel, scheme: str, **options: Any) -> Explanation:
    evaluation, calibration = windows()
    return explain(model, scheme, calibration=calibration.split(1), data=evaluation, **options)


def tiny(name: str, scheme: str, **options: Any) -> Explanation:
    _, graph = traced(name)
    data = token_ids(2, 20, 50)
    return explain(graph, scheme, calibration=[token_ids(2, 16, 5)], data=data, **options)


# Identities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w8a8-static:p99", "w4-g16-asym/a8-dynamic-token", "w3"])
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_effects_and_causes_sum_to_the_loss_difference(name: str, scheme: str) -> None:
    found = tiny(name, scheme, methods=EVERYTHING)
    _, graph = traced(name)
    data = token_ids(2, 20, 50)
    qmodel = fxquant.convert(graph, scheme, calibration=[token_ids(2, 16, 5)], level="qdq")
    # Independent of the lab: window by window, as a dynamic range sees them.
    losses = [
        torch.cat([token_nll(gm(input_ids=ids), ids) for ids in data.split(1)]).double().mean()
        for gm in (graph, qmodel)
    ]
    assert found.loss_float == pytest.approx(float(losses[0]), rel=1e-6)
    assert found.loss_quantized == pytest.approx(float(losses[1]), rel=1e-6)
    tolerance = 1e-5 * max(1, abs(found.delta_loss))
    assert abs(found.delta_loss) > 1e-5
    total = sum(site.effects["in_order"] for site in found.sites)
    assert total == pytest.approx(found.delta_loss, abs=tolerance)
    assert found.causes is not None
    assert sum(found.causes.values()) == pytest.approx(found.delta_loss, abs=tolerance)
    for groups in (found.kinds, found.blocks):
        assert sum(group.sites for group in groups) == len(found.sites)
        summed = sum(group.sums["in_order"] for group in groups)
        assert summed == pytest.approx(found.delta_loss, abs=tolerance)
    measured = sum(kind.measured["in_order:kinds"] for kind in found.kinds)
    assert measured == pytest.approx(found.delta_loss, abs=tolerance)
    for site in found.worst[:3]:
        if site.causes is not None:
            assert sum(site.causes.values()) == pytest.approx(site.effects["rescue"], abs=tolerance)
    assert found.recovery[0].delta_loss == pytest.approx(found.delta_loss, abs=tolerance)
    assert found.recovery[-1].delta_loss == pytest.approx(0, abs=tolerance)
    assert found.recovery[1].delta_loss == pytest.approx(
        found.delta_loss - found.worst[0].effects["rescue"], abs=tolerance
    )
    back_to_float = [c for c in found.counterfactuals if c.choice == "float"]
    assert {c.site: c.recovered for c in back_to_float} == pytest.approx(
        {site.site: site.effects["rescue"] for site in found.worst[:3]}, abs=tolerance
    )


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_one_site_has_one_effect(name: str) -> None:
    """A glob restricts the scheme itself, so alone, rescue and in order mean the same."""
    site = tiny(name, "w4", worst=0, methods=("alone",)).sites[5].site
    found = tiny(name, "w4/a4-dynamic", sites=site, methods=EVERYTHING)
    assert [each.site for each in found.sites] == [site]
    effects = found.sites[0].effects
    tolerance = 1e-5 * max(1, abs(found.delta_loss))
    assert abs(found.delta_loss) > 1e-4
    for effect in EFFECTS:
        assert effects[effect] == pytest.approx(found.delta_loss, abs=tolerance)


def test_effects_are_what_two_conversions_measure() -> None:
    """alone and rescue of every site against convert with overrides, without the lab."""
    _, graph = traced("llama")
    data = token_ids(1, 24, 9)
    found = explain(graph, "w4/a8-dynamic", data=data, methods=("alone", "rescue"), worst=0)

    def loss(overrides: dict[str, str], base: str) -> float:
        scheme = json.dumps({"scheme": base, "overrides": overrides})
        qmodel = fxquant.convert(graph, scheme, level="qdq")
        return float(token_nll(qmodel(input_ids=data), data).double().mean())

    for site in found.sites[::3]:
        only = loss({site.site: "w4/a8-dynamic"}, "fp") - found.loss_float
        without = found.loss_quantized - loss({site.site: "fp"}, "w4/a8-dynamic")
        assert site.effects["alone"] == pytest.approx(only, abs=2e-6)
        assert site.effects["rescue"] == pytest.approx(without, abs=2e-6)


def test_shapley_of_an_additive_game_and_of_an_interaction() -> None:
    worth = {"weights": 1.0, "clipping": 2.0, "rounding": 4.0}
    additive = {parts: sum(worth[p] for p in parts) for parts in subsets(CAUSES)}
    assert shapley(additive, CAUSES) == pytest.approx(worth)
    pair = {parts: float({"weights", "clipping"} <= parts) for parts in subsets(CAUSES)}
    assert shapley(pair, CAUSES) == pytest.approx({"weights": 0.5, "clipping": 0.5, "rounding": 0})
    single = {frozenset(): 1.0, frozenset(("weights",)): 3.0}
    assert shapley(single, ["weights"]) == {"weights": 2.0, "clipping": 0.0, "rounding": 0.0}  # type: ignore[arg-type]


# path ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [1, 2, 4, 8])
def test_gauss_legendre_is_exact_for_polynomials(points: int) -> None:
    nodes, weights = gauss_legendre(points)
    for degree in range(2 * points):
        total = sum(w * x**degree for x, w in zip(nodes, weights, strict=True))
        assert total == pytest.approx(1 / (degree + 1), abs=1e-12)


@pytest.mark.parametrize("name", ["opt", "llama", "gemma2-eager", "phi", "gptj"])
def test_path_converges_and_every_view_has_one_sum(name: str) -> None:
    lab, sites = laboratory(name, "w6/a8-dynamic")
    found = integrate(lab, sites)
    assert found.refused is None
    assert found.estimate == pytest.approx(
        sum(site.total for site in found.sites.values()), abs=1e-6
    )
    for site in found.sites.values():
        assert site.channels is not None
        tokens = sum(float(t.sum()) for t in site.tokens)
        assert tokens == pytest.approx(site.total, abs=1e-6)
        assert float(site.channels.sum()) == pytest.approx(site.total, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_path_by_cause_is_close_to_the_exact_causes(name: str) -> None:
    """Small errors add up, and then every fair split of them is the same one."""
    lab, sites = laboratory(name, "w7/a7-static:p97")
    found = integrate(lab, sites)
    assert found.refused is None
    exact = causes_of(lab, sites, cuts=lab.start(), remember=lambda _, compute: compute())
    size = max(abs(value) for value in exact.values())
    by_path = {c: sum(site.causes[c] for site in found.sites.values()) for c in CAUSES}
    assert by_path == pytest.approx(exact, abs=0.25 * size)
    assert abs(exact["clipping"] - exact["rounding"]) > 0.6 * size  # swapped they would not pass


def test_first_order_is_the_derivative() -> None:
    """Against a central difference in float64, along the error of one site's weights."""
    # OPT: Llama's norms compute in float32 even in a float64 model.
    lab, sites = laboratory("opt", "w4", windows=1)
    site = sites[0]
    assert isinstance(site, LinearSite)
    found = first_order(lab, [site])[site.path]
    assert site.bias is not None
    weight, coded, bias = (t.double() for t in (site.weight, site.coded_weight, site.bias))
    lab.gm.double()
    ids = lab.windows[0]

    @torch.no_grad()
    def loss(alpha: float) -> float:
        moved = weight + alpha * (coded - weight)
        under = {site.node: lambda x: torch.nn.functional.linear(x, moved, bias)}
        cut = lab.executor.advance(lab.executor.start(input_ids=ids), instead=under)
        logits = cut.values[lab.executor.nodes[-1]][0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))

    step = 1e-3
    assert found == pytest.approx((loss(step) - loss(-step)) / (2 * step), rel=1e-3)


def test_path_refuses_what_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """One point is too few where 2-bit clipping costs nats."""
    monkeypatch.setattr("fxquant.analysis.path.POINTS", (1,))
    found = tiny("opt", "w2-tensor/a2-static:p60", methods=("path", "rescue"), worst=0)
    assert found.path is not None
    assert found.path.refused is not None
    assert "has not converged with 1 points" in found.path.refused
    assert abs(found.path.residual) > 0.05 * found.delta_loss > 0.05
    assert all(site.path is None for site in found.sites)
    assert all("path" not in kind.sums for kind in found.kinds)
    assert "path is not presented" in str(found)
    assert [row for row in found.validation if row.figure == "path (refused)"]


# Planted faults -----------------------------------------------------------------------------------


@torch.no_grad()
def sampled_llama() -> tuple[PreTrainedModel, Tensor]:
    """A random model with a sharp head, and windows [4, 60] sampled from it.

    On its own samples the float model is the best predictor there is, as if trained on them: an
    error raises the loss, as it does on a trained model.
    """
    model = ARCHITECTURES["llama"]()
    model.lm_head.weight.mul_(2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (4, 1), generator=generator)
    for _ in range(59):
        likely = model(input_ids=ids).logits[:, -1].softmax(-1)
        ids = torch.cat((ids, torch.multinomial(likely, 1, generator=generator)), 1)
    return model, ids


def stretched(model: PreTrainedModel, block: int, seed: int) -> tuple[PreTrainedModel, str, int]:
    """The model with one outlier channel planted at the last norm of one block: MLP input."""
    plan = OutlierPlan(seed, kinds=("gain",), channel_share=0.001, gain_range=(256, 256))
    changed, planted = plant_outliers(model, plan)
    norms = sorted({p.path for p in planted if "final_layer" in p.path or "post_att" in p.path})
    kept = norms[block]
    for outlier in planted:  # take the others back: the plan plants in every layer
        if outlier.path == kept:
            continue
        norm = changed.get_submodule(outlier.path)
        norm.load_state_dict(model.get_submodule(outlier.path).state_dict())
        for name in consumers(outlier.path, changed):
            changed.get_submodule(name).load_state_dict(model.get_submodule(name).state_dict())
    return changed, kept, next(p.channel for p in planted if p.path == kept)


def consumers(norm: str, model: PreTrainedModel) -> list[str]:
    block, _, name = norm.rpartition(".")
    attention = [f"self_attn.{each}_proj" for each in "qkv"]
    mlp = ["fc1", "mlp.gate_proj", "mlp.up_proj"]
    wanted = attention if name in ("self_attn_layer_norm", "input_layernorm") else mlp
    known = dict(model.named_modules())
    return [f"{block}.{each}" for each in wanted if f"{block}.{each}" in known]


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("which", ["small opt", "llama"])
def test_a_planted_outlier_is_found(which: str, block: int) -> None:
    """A dynamic range is stretched by one channel: rounding, at the sites that read it."""
    if which == "small opt":
        changed, norm, channel = stretched(small_opt()[0], block, seed=3)
        found = explain_small(changed, "w8a8-dynamic", methods=("rescue", "causes"))
    else:
        model, data = sampled_llama()
        changed, norm, channel = stretched(model, block, seed=3)
        found = explain(changed, "w8a8-dynamic", data=data, methods=("rescue", "causes"))
    readers = consumers(norm, changed)
    worst = found.worst[0]
    assert worst.site in readers
    assert worst.cause == "rounding"
    assert worst.worst_channels[0].channel == channel
    assert worst.worst_channels[0].blame > 0.9
    assert found.causes is not None
    assert max(found.causes, key=lambda c: found.causes[c]) == "rounding"  # type: ignore[index]
    best = max(
        (c for c in found.counterfactuals if c.site == worst.site and "channel" in c.choice),
        key=lambda c: c.recovered,
    )
    assert best.recovered > 0.7 * worst.effects["rescue"]


@pytest.mark.parametrize("fault", ["clipping", "weights"])
def test_clipping_and_a_bad_weight_scale_are_told_apart(fault: str) -> None:
    """At one site either the range cuts a planted outlier or the codes' scale is half too large."""
    site = "model.decoder.layers.1.fc1"
    model, _ = plant_outliers(small_opt()[0], OutlierPlan(0, kinds=("shift",)))
    graph, scheme = fxquant.trace(model), "w8a8-dynamic-token"
    if fault == "clipping":
        scheme = json.dumps({"scheme": scheme, "overrides": {site: "w8a8-static:p99"}})
    else:
        weight, bias = linear_parameters(graph.get_submodule(site))
        codes = min_max_codes(weight, TensorSpec(integer(8)), site).tensors()
        codes["weight_scale"] = codes["weight_scale"] * 1.5
        install(graph, site, CodedLinear(weight, bias, TensorSpec(integer(8)), codes))
    evaluation, calibration = windows()
    found = explain(
        graph,
        scheme,
        calibration=calibration.split(1),
        data=evaluation,
        methods=("rescue", "causes"),
        worst=1,
    )
    worst = found.worst[0]
    assert worst.site == site
    assert worst.effects["rescue"] > 0.5 * found.delta_loss > 0.05
    assert worst.cause == fault
    assert found.causes is not None
    assert found.causes[fault] > 0.5 * found.delta_loss
    assert worst.energy[fault] > 0.8 * sum(worst.energy.values())
    recovered = {c.choice: c.recovered for c in found.counterfactuals}
    repair, useless = "static absmax", "float weight"
    if fault == "weights":
        repair, useless = useless, "16-bit activation, same range"
    assert recovered[repair] > 0.7 * worst.effects["rescue"]
    assert recovered[useless] < 0.1 * worst.effects["rescue"]


# Report, resume, refusals -------------------------------------------------------------------------


def test_report_and_plain_data() -> None:
    model, tokenizer = small_opt()
    found = explain_small(model, "w8a8-static:p99", tokenizer=tokenizer, methods="full")
    text = str(found)
    for part in (
        "Causes",
        "Kinds of site",
        "Worst sites, by in_order",
        "recovered",
        "path:",
        "Cost",
    ):
        assert part in text
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["delta_loss"] == pytest.approx(data["loss_quantized"] - data["loss_float"])
    assert set(data["causes"]) == set(CAUSES)
    site = data["sites"][0]
    for name in ("site", "kind", "in_order", "rescue", "path", "worst_channels", "worst_tokens"):
        assert name in site
    assert "alone" not in site
    assert {row["figure"] for row in data["validation"]} >= {"local SQNR", "local MSE", "rescue"}
    token = data["sites"][0]["worst_tokens"][0]
    assert isinstance(token["text"], str)
    groups = data["sites"][0]["token_groups"]
    assert set(groups) == {"first", "delimiter", "rest"}
    assert sum(groups.values()) == pytest.approx(1)
    assert data["costs"]["in_order"]["forwards"] < 0.6 * len(data["sites"])


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny("opt", "w4", methods=("rescue", "causes"))
    kept_losses = interrupt_store(monkeypatch, after=5)
    with pytest.raises(KeyboardInterrupt):
        tiny("opt", "w4", methods=("rescue", "causes"), output=tmp_path)
    (kept,) = tmp_path.glob("losses-*.jsonl")
    assert len(kept.read_text().splitlines()) == 5
    with kept.open("a") as file:
        file.write('{"name": "rescue half')  # what a crash leaves
    resumed = tiny("opt", "w4", methods=("rescue", "causes"), output=tmp_path)
    before = len(kept_losses)
    assert resumed.sites == whole.sites
    assert resumed.causes == whole.causes
    # What the first run measured counts with its cost then.
    for name, cost in whole.costs.items():
        assert resumed.costs[name].forwards == pytest.approx(cost.forwards)
        assert not resumed.costs[name].partial
    tiny("opt", "w4", methods=("rescue", "causes"), output=tmp_path)
    assert len(kept_losses) - before < (before - 5) / 2
    # Losses whose cost was not kept: the report says that the sum is partial.
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    bare = (Loss(line["name"], line["value"], None).to_line(kept.name) for line in lines)
    kept.write_text("".join(line + "\n" for line in bare))
    unknown = tiny("opt", "w4", methods=("rescue", "causes"), output=tmp_path)
    assert unknown.costs["rescue"].partial
    assert unknown.to_dict()["costs"]["rescue"]["partial"]
    assert "resumed, only what was run again is counted: rescue, other choices" in str(unknown)
    # Another scheme is another fingerprint: nothing of it is reused.
    other = tiny("opt", "w3", methods=("rescue",), output=tmp_path)
    assert len(list(tmp_path.glob("losses-*.jsonl"))) == 2
    assert other.loss_quantized != whole.loss_quantized


def test_the_fingerprint_sees_what_losses_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activation functions, their options, the configuration, and the package's own code."""
    _, graph = traced("opt")
    ids = [token_ids(1, 8)]
    found = {fingerprint(graph, ids, "w8"), fingerprint(copy.deepcopy(graph), ids, "w8")}
    assert len(found) == 1
    changed = copy.deepcopy(graph)
    norm = next(m for m in changed.modules() if isinstance(m, torch.nn.LayerNorm))
    norm.eps *= 10
    found.add(fingerprint(changed, ids, "w8"))
    for path, module in graph.named_modules():
        if isinstance(module, torch.nn.ReLU):
            other = copy.deepcopy(graph)
            other.set_submodule(path, torch.nn.GELU())
            found.add(fingerprint(other, ids, "w8"))
            break
    else:
        pytest.fail("no ReLU is a leaf")
    configured = copy.deepcopy(graph)
    update_info(configured, config="{}")
    found.add(fingerprint(configured, ids, "w8"))
    monkeypatch.setattr("fxquant.analysis.store.source_digest", lambda: "another version")
    found.add(fingerprint(graph, ids, "w8"))
    assert len(found) == 5


def test_what_is_refused_before_work() -> None:
    _, graph = traced("opt")
    ids = token_ids(1, 8)
    nothing: Any = None  # no model is looked at
    with pytest.raises(SchemeError, match="unknown method"):
        explain(graph, "w8", data=ids, methods=("in-order",))
    for repairs, said in (
        ("foo", "unknown pass in scheme w8.foo: foo"),
        ("smooth+foo", "unknown pass in scheme .*: foo"),
        ("smooth(beta=1)", "smooth has no option beta"),
        ("clip+smooth(alpha=2)", "smooth: alpha must be"),
    ):
        for sites in (None, "*.fc1"):
            with pytest.raises(SchemeError, match=said):
                explain(nothing, f"w8+{repairs}", data=ids, sites=sites)
    with pytest.raises(SchemeError, match="covers no site"):
        explain(graph, "w8", data=ids, sites="*.fc9")
    with pytest.raises(SchemeError, match="quantizes nothing"):
        explain(graph, "fp", data=ids)
    with pytest.raises(DataError, match="no windows"):
        explain(graph, "w8")
    with pytest.raises(DataError, match="window 0: token ids"):
        explain(graph, "w8", data=ids + 1000)
    with pytest.raises(DataError, match="no token to predict"):
        explain(graph, "w8", data=ids[:, :1])
    with pytest.raises(DataError, match="expected integers"):
        explain(graph, "w8", data=[ids[None]])
    with pytest.raises(CalibrationError):
        explain(graph, "w8a8-static", data=ids)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with pytest.raises(DataError, match="calibration batch 1 is padded"):
        explain(graph, "w8", calibration=[ids, {"input_ids": ids, "attention_mask": mask}])


def test_without_data_the_calibration_serves_and_it_says_so() -> None:
    _, graph = traced("opt")
    batches = [token_ids(1, 20, 3)]
    found = explain(graph, "w8a8-static", calibration=batches, methods=("alone",), worst=0)
    same = explain(
        graph,
        "w8a8-static",
        calibration=batches,
        data=batches,
        methods=("alone",),
        worst=0,
        allow_overlap=True,
    )
    assert found.sites == same.sites
    assert any("calibration batches" in note for note in found.notes)
    (note,) = same.notes
    assert "data=: 1 of the 1 window holds what is calibrated on" in note


def test_head_of_the_report_and_notes() -> None:
    _, graph = traced("llama")
    data = [token_ids(1, 12), token_ids(2, 20)]
    found = explain(graph, "w8+kv8", data=data, methods="alone", worst=0)
    assert list(found.costs) == ["local figures", "alone"]
    assert "3 windows of 12 to 20 tokens" in str(found)
    assert any("kv8 changes the float graph itself" in note for note in found.notes)
    assert found.loss_float != found.loss_unrepaired
    assert "weights, energy" in str(found)
    assert found.to_dict()["sites"][0]["cause_by"] == "energy"


def test_bars_show_on_a_terminal_alone(capsys: pytest.CaptureFixture[str]) -> None:
    _, graph = traced("opt")
    options: dict[str, Any] = {"calibration": [token_ids(1, 20)], "methods": "alone", "worst": 0}
    explain(graph, "w8a8-static", **options)
    assert capsys.readouterr().err == ""
    explain(graph, "w8a8-static", progress=True, **options)
    assert "local figures" in capsys.readouterr().err


def test_spearman_and_agreement() -> None:
    a = torch.tensor([1.0, 2, 2, 5])
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert math.isnan(spearman(a, torch.ones(4)))
    # By hand: ranks 0, 1.5, 1.5, 3 against 3, 0, 1, 2.
    assert spearman(a, torch.tensor([9.0, 1, 2, 3])) == pytest.approx(-1.5 / (4.5 * 5) ** 0.5)
    found = agreement("f", {"a": 1.0, "b": 3.0}, "g", {"a": 2.0, "b": 2.0}, in_nats=True)
    assert found.error == pytest.approx(0.5)


def test_rescues_that_share_one_draw_are_called_out() -> None:
    """A loss that the run happened to draw high stands in every rescue."""
    effects = {str(i): 0.01 * (i % 3) for i in range(21)}  # they sum to 0.21
    assert shared_draw(effects, 0.21) is None
    assert shared_draw({"only": 0.3}, 0.3) is None
    shifted = {site: value + 0.05 for site, value in effects.items()}
    text = shared_draw(shifted, 0.21)
    assert text is not None
    assert "21 sites give +1.2600 together against Δloss +0.2100" in text
    assert "in_order and alone" in text


def test_what_calls_sites_worst() -> None:
    """in_order before alone before path where it converged before rescue."""
    everything = ("rescue", "path", "alone", "in_order")
    for dropped, ranking in enumerate(("in_order", "alone", "path", "rescue")):
        found = tiny("opt", "w6", methods=everything[: 4 - dropped], worst=0)
        assert found.ranking == ranking
        values = [
            sum((site.path or {}).values()) if ranking == "path" else site.effects[ranking]
            for site in found.worst
        ]
        assert values == sorted(values, reverse=True)
        assert len(set(values)) > 1


def test_the_cause_of_an_error_that_lowers_the_loss() -> None:
    """The part that lowers it least is not what makes the error."""
    (site, *_) = tiny("opt", "w8a8-static:p99", methods=("alone",), worst=0).sites
    energy: dict[Cause, float] = {"weights": 1.0, "clipping": 9.0, "rounding": 0.5}
    harmful: dict[Cause, float] = {"weights": 0.1, "clipping": 0.2, "rounding": 0.4}
    lowering: dict[Cause, float] = {"weights": -0.1, "clipping": -1.6, "rounding": -0.01}
    assert replace(site, energy=energy, causes=None).cause == "clipping"
    assert replace(site, energy=energy, causes=harmful).cause == "rounding"
    assert replace(site, energy=energy, causes=lowering).cause == "clipping"
