"""The fourth cause: scales that are rounded themselves, against a plain game in float64."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.analysis.explanation import FULL_METHODS
from fxquant.errors import NonFiniteError
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import TensorSpec
from tests.architectures import llama, token_ids
from tests.grid_reference import in_groups, on_levels, scale_of

FOUR = ("weights", "clipping", "rounding", "scale")
DATA = [token_ids(4, 24, seed=9)]


def stepped(x: Tensor, spec: TensorSpec, rounding: str, parts: frozenset[str]) -> Tensor:
    """x float64 with these parts of its error; ``rounding``: what that part is called."""
    if not parts & {rounding, "clipping"}:
        return x
    whole, found = float(x.abs().max()), []
    for part in in_groups(x, spec):
        largest = part.abs().amax(-1, keepdim=True)
        exact = torch.where(largest == 0, 1.0, largest / spec.grid.reach).float().double()
        kept = scale_of(largest, spec, whole)
        clipped = part.clamp(-spec.grid.reach * kept, spec.grid.reach * kept)
        used = kept if "scale" in parts else exact
        coded = on_levels((clipped.float() / used.float()).double(), spec.grid) * used
        start = clipped if "clipping" in parts else part
        found.append(start + (coded - clipped) if rounding in parts else start)
    return torch.cat(found, -1)


@torch.no_grad()
def plain_loss(text: str, parts: frozenset[str], ids: Tensor) -> float:
    """Of the model whose linears have these parts of their errors."""
    model, spec = llama().double(), Scheme.parse(text).spec
    assert spec.weight is not None

    def swap(own: TensorSpec, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (stepped(args[0].float().double(), own, "rounding", parts),)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight.data = stepped(layer.weight.data, spec.weight, "weights", parts)
            if spec.activation is not None:
                layer.register_forward_pre_hook(partial(swap, spec.activation.tensor))
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    return float(nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))


def plain_shapley(loss: Callable[[frozenset[str]], float]) -> dict[str, float]:
    losses = {
        frozenset(chosen): loss(frozenset(chosen))
        for size in range(len(FOUR) + 1)
        for chosen in itertools.combinations(FOUR, size)
    }
    found = dict.fromkeys(FOUR, 0.0)
    for cause in FOUR:
        for parts in (each for each in losses if cause not in each):
            ways = math.factorial(len(parts)) * math.factorial(len(FOUR) - len(parts) - 1)
            found[cause] += (
                ways / math.factorial(len(FOUR)) * (losses[parts | {cause}] - losses[parts])
            )
    return found


@pytest.mark.parametrize("text", ["mxfp4", "nvfp4", "wmxfp4", "we2m1-g8-e8m0-ceil/afp8"])
def test_four_causes_are_the_shapley_values_of_the_game(text: str) -> None:
    why = fxquant.explain(llama(), text, data=DATA, methods="causes", worst=0)
    assert why.causes is not None
    assert tuple(why.causes) == FOUR
    assert sum(why.causes.values()) == pytest.approx(why.delta_loss, abs=1e-6)
    wanted = plain_shapley(lambda parts: plain_loss(text, parts, DATA[0]))
    size = sum(map(abs, wanted.values()))
    # A value near a middle may flip by a float32 rounding before it.
    assert why.causes == pytest.approx(wanted, abs=0.03 * size)
    if "e8m0" in str(Scheme.parse(text)):  # scales in E4M3 are hardly rounded
        assert abs(why.causes["scale"]) > 0.03 * size


@pytest.mark.parametrize("text", ["fp8", "w4-g16", "we2m1-g16/ae2m1-dynamic-g16", "w4a8-dynamic"])
def test_scales_as_they_are_have_three_causes(text: str) -> None:
    why = fxquant.explain(llama(), text, data=DATA, methods="causes", worst=1)
    assert why.causes is not None
    assert tuple(why.causes) == FOUR[:3]
    assert all(set(site.energy) == set(FOUR[:3]) for site in why.sites)
    assert "scale energy" not in str(why)
    assert "scale:" not in str(why)


def test_the_rule_is_told_apart_from_the_grid() -> None:
    """floor clips and ceil, twice as wide at most, does not: the game says so."""
    found = {
        rule: fxquant.explain(llama(), f"wmxfp4{rule}", data=DATA, methods="causes", worst=0)
        for rule in ("", "-ceil")
    }
    floor, ceil = (each.causes or {} for each in found.values())
    assert floor["clipping"] != 0 == ceil["clipping"]
    assert abs(ceil["scale"]) > 0.05 * abs(ceil["weights"])


def test_codes_that_a_repair_chose_are_weights_alone() -> None:
    """There are no nearest codes to hold them against."""
    why = fxquant.explain(
        llama(), "wmxfp4+gptq", data=DATA, calibration=[token_ids(4, 24, seed=1)], methods="causes"
    )
    assert why.causes is not None
    assert tuple(why.causes) == FOUR[:3]
    assert why.causes["weights"] == pytest.approx(why.delta_loss, abs=1e-6)


def test_the_report_and_its_json_have_the_fourth() -> None:
    override = '{"scheme": "nvfp4", "overrides": {"*.down_proj": "w8a8-dynamic", "head": "wmxfp4"}}'
    why = fxquant.explain(llama(), override, data=DATA, methods=FULL_METHODS, worst=2)
    data = json.loads(json.dumps(why.to_dict(), allow_nan=False))
    assert tuple(data["causes"]) == FOUR
    by_site = {site["site"]: site for site in data["sites"]}
    down = by_site["model.layers.0.mlp.down_proj"]
    up = by_site["model.layers.0.mlp.up_proj"]
    assert tuple(down["energy"]) == FOUR[:3]
    assert tuple(up["energy"]) == FOUR
    for kind in data["kinds"]:
        measured = kind["causes"]
        assert ("scale" in measured) is ("down_proj" not in kind["name"])
    worst = [site for site in data["sites"] if site["causes"]]
    for site in worst:
        assert sum(site["causes"].values()) == pytest.approx(site["rescue"], abs=1e-6)
    text = str(why)
    assert "| scale " in text
    assert "scale energy" in text
    assert "scale: rounding of the scales themselves" in text


def test_path_splits_scale_off_too() -> None:
    """Of small errors every fair split is about the same; the sums are exact in any case."""
    why = fxquant.explain(llama(), "mxfp8", data=DATA, methods=("causes", "path"), worst=0)
    assert why.path is not None
    assert why.path.refused is None
    total = sum(sum((site.path or {}).values()) for site in why.sites)
    assert total == pytest.approx(why.path.estimate, abs=1e-6)
    assert all(set(site.path or {}) == set(FOUR) for site in why.sites)


@pytest.mark.parametrize("text", ["w4-g16-fp16-asym", "w4-g12-fp16-asym/a8-dynamic-g16-fp16"])
def test_scales_in_fp16_beside_zero_points(text: str) -> None:
    why = fxquant.explain(llama(), text, data=DATA, methods="causes", worst=1)
    assert why.causes is not None
    assert tuple(why.causes) == FOUR
    assert sum(why.causes.values()) == pytest.approx(why.delta_loss, abs=1e-6)


@pytest.mark.parametrize("repair", ["kv8", "kv4", "kv8(format=fp8)"])
def test_gradients_pass_the_caches_rounding(repair: str) -> None:
    """As if it were not there: what one backward pass predicts stays of the size that it had."""
    graph = fxquant.trace(llama())
    plain, stored = (
        fxquant.explain(graph, text, data=DATA, methods="first_order", worst=0)
        for text in ("w3", f"w3+{repair}")
    )
    for one, other in zip(plain.sites, stored.sites, strict=True):
        if one.site.endswith(("k_proj", "v_proj")):
            first, second = one.effects["first_order"], other.effects["first_order"]
            assert abs(second - first) < 0.5 * abs(first) + 1e-3


def test_an_overflow_is_said_whatever_the_scales() -> None:
    """Values that are not finite have no part of scales that are not rounded."""
    model = llama()
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(18434)
    with pytest.raises(NonFiniteError, match="overflows the model's dtype"):
        fxquant.explain(
            model.to(torch.float16), "w2a8-dynamic-token", data=DATA, methods="causes", worst=0
        )
