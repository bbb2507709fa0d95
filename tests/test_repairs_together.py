"""Repairs behind one another: attention's products, chosen grids, the repairs that meet them."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.errors import FxquantError
from fxquant.ir.graph import clone_sharing_storage, info, linear_parameters
from fxquant.ir.leaves import CodedLinear
from fxquant.passes import DecomposeAttention, Gptq, NameSites
from fxquant.pipeline.context import Context
from fxquant.recipes.repairs import REPAIRS
from fxquant.schemes.scheme import Scheme
from fxquant.structure.query_key import query_key_linears
from tests.architectures import ARCHITECTURES, token_ids
from tests.gptq_reference import min_max_grid

BATCHES = [token_ids(4, 20, seed=5), token_ids(4, 20, seed=6)]
MODELS = ("opt", "llama")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "repairs", ["attn8+awq", "attn8+smooth(alpha=auto)", "kv8+smooth(where=all)", "attn8+gptq"]
)
def test_attention_products_first_then_a_repair_of_the_linears(name: str, repairs: str) -> None:
    bits = "w4" if "gptq" in repairs or "awq" in repairs else "w8"
    scheme = f"{bits}/a8-dynamic-token+{repairs}"
    quantized = fxquant.convert(ARCHITECTURES[name](), scheme, calibration=BATCHES)
    ran = [record.name for record in info(quantized).history]
    assert ran.index(repairs.split("+")[0]) < ran.index(repairs.split("+")[1].partition("(")[0])
    logits = quantized(input_ids=BATCHES[0])
    plain = fxquant.convert(ARCHITECTURES[name](), "fp")(input_ids=BATCHES[0])
    # 4-bit weights at random leave about a fifth of the logits' norm as error, noise all of it.
    assert float((logits - plain).norm() / plain.norm()) < 0.5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("repair", ["clip", "correct_bias", "split_outliers(threshold=2.5)"])
def test_an_override_of_linears_and_products_changes_linears_only(name: str, repair: str) -> None:
    scheme = f"w8a8-dynamic+attn8+{repair}"
    mixed = f'{{"scheme": "{scheme}", "overrides": {{"*.self_attn.*": "w4a8-dynamic-token"}}}}'
    quantized = fxquant.convert(ARCHITECTURES[name](), mixed, calibration=BATCHES[:1])
    facts = info(quantized)
    products = {site.path: site for site in facts.sites if site.role == "matmul"}
    assert len(products) == 2 * len(facts.blocks)
    assert not any(site.bias for site in products.values())
    own = repair.partition("(")[0]
    assert products.keys().isdisjoint(n.site for n in facts.notes if n.origin == own)
    assert bool(quantized(input_ids=BATCHES[0]).isfinite().all())


@pytest.mark.parametrize("name", MODELS)
def test_queries_and_keys_are_found_in_written_out_attention(name: str) -> None:
    named = NameSites()(fxquant.trace(ARCHITECTURES[name]()))
    found = query_key_linears(named)
    assert len(found) == 2 * len(info(named).blocks)
    assert query_key_linears(DecomposeAttention()(named)) == found


@pytest.mark.parametrize("spec", ["w4", "w3-g8-asym"])
def test_gptq_on_the_min_max_grid(spec: str) -> None:
    gm = NameSites()(fxquant.trace(ARCHITECTURES["llama"]()))
    context = Context(Scheme.parse(spec), BATCHES)
    chosen = Gptq(grid="minmax")(gm, context)
    searched = Gptq()(gm, context)
    differing = 0
    for site in info(gm).sites:
        module = chosen.get_submodule(site.path)
        if site.role != "linear":
            continue
        assert isinstance(module, CodedLinear)
        weight, _ = linear_parameters(module)
        scale, _ = min_max_grid(weight, module.spec)
        assert torch.equal(module.codes.get_buffer("weight_scale"), scale), site.path
        other = searched.get_buffer(f"{site.path}.codes.weight_scale")
        differing += not torch.equal(other, scale)
    assert differing


def test_an_unknown_grid_is_refused() -> None:
    with pytest.raises(fxquant.FxquantError, match="grid must be search or minmax"):
        fxquant.recipe("w4+gptq(grid=mse)", calibration=BATCHES)


def test_gptq_resumes_with_the_codes_it_kept(tmp_path: Path) -> None:
    gm = NameSites()(fxquant.trace(ARCHITECTURES["opt"]()))
    context = Context(Scheme.parse("w4"), BATCHES, cache=tmp_path)
    first = Gptq()(clone_sharing_storage(gm), context)
    assert list(tmp_path.rglob("*.safetensors"))
    again = Gptq()(gm, context)
    for site in info(gm).sites:
        before, after = first.get_submodule(site.path), again.get_submodule(site.path)
        if isinstance(before, CodedLinear) and isinstance(after, CodedLinear):
            for name, value in before.codes.named_buffers():
                assert torch.equal(value, after.codes.get_buffer(name)), (site.path, name)


@pytest.mark.parametrize(
    ("scheme", "readings"),
    [
        ("w4+awq", 2),
        ("w8a8-dynamic+smooth(alpha=auto)", 2),
        ("w8a8-static+smooth", 2),
        ("w4+awq(scale=false)", 1),
        ("w4+kv8+gptq", 1),
    ],
)
def test_an_iterator_goes_as_far_as_it_is_read_once(scheme: str, readings: int) -> None:
    model = ARCHITECTURES["llama"]()
    if readings == 1:
        fxquant.convert(model, scheme, calibration=iter(BATCHES))
        return
    with pytest.raises(fxquant.FxquantError, match=f"reads the calibration data {readings} times"):
        fxquant.convert(model, scheme, calibration=iter(BATCHES))


def test_every_repair_has_a_name_that_a_scheme_can_spell() -> None:
    for name in REPAIRS:
        assert Scheme.parse(str(Scheme.parse(f"w8+{name}"))).repairs == ((name, ()),)


OPTIONS = {"split_outliers": "split_outliers(threshold=2.5)"}
SCHEMES = {
    "opt": "w4a8-static",
    "llama": "w4-g12-asym/a8-dynamic-token",
    "gpt2": '{"scheme": "w4-tensor/a8-static-asym:mse", "overrides": {"head": "w8"}}',
}
PAIRS = list(itertools.product(REPAIRS, REPAIRS))
# Every repair once in front of its neighbour in the table, and once behind it.
NEIGHBOURS = [
    pair
    for first, second in itertools.pairwise([*REPAIRS, next(iter(REPAIRS))])
    for pair in ((first, second), (second, first))
]


@functools.cache
def traced(name: str) -> torch.fx.GraphModule:
    return fxquant.trace(ARCHITECTURES[name]())


def check_pair(name: str, first: str, second: str) -> None:
    """The two convert, or are refused for a reason that one of them gives; nothing else."""
    repairs = "".join(f"+{OPTIONS.get(each, each)}" for each in (first, second))
    scheme = Scheme.parse(SCHEMES[name])
    both = replace(scheme, repairs=Scheme.parse(f"w8{repairs}").repairs)
    refused = ""
    try:
        quantized = fxquant.convert(traced(name), both, calibration=BATCHES)
    except FxquantError as error:
        refused = str(error)
    if refused:
        assert refused.startswith((first, second)), refused
        return
    ran = [record.name for record in info(quantized).history]
    assert {first, second} <= set(ran)
    assert bool(quantized(input_ids=BATCHES[0]).isfinite().all())


@pytest.mark.parametrize(("first", "second"), NEIGHBOURS)
def test_neighbouring_repairs_convert_or_say_why(first: str, second: str) -> None:
    check_pair("opt", first, second)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_all_pairs_of_repairs_convert_or_say_why(name: str) -> None:
    for first, second in PAIRS:
        check_pair(name, first, second)
