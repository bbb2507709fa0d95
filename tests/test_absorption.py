"""The absorption question: who can take a scale, who must share it, and what is in the way."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant.errors import NonFiniteError, SchemeError
from fxquant.formats.integer import integer
from fxquant.ir.graph import clone_sharing_storage, info, install, linear_parameters
from fxquant.ir.leaves import CodedLinear
from fxquant.passes import NameSites
from fxquant.schemes.specs import TensorSpec
from fxquant.structure.absorption import ScaleGroup, scale_groups
from fxquant.structure.rescaling import rescale
from tests.architectures import ARCHITECTURES, token_ids


@functools.cache
def named(name: str) -> GraphModule:
    """Shared; tests change copies."""
    return NameSites()(fxquant.trace(ARCHITECTURES[name]()))


def first_block(gm: GraphModule) -> dict[str, ScaleGroup]:
    """The groups of the first block, by the last parts of their members' names."""
    prefix = next(g.consumers[0].site.path for g in scale_groups(gm)).split(".0.")[0] + ".0."
    return {
        " ".join(c.site.path.rsplit(".", 1)[1] for c in group.consumers): group
        for group in scale_groups(gm)
        if group.consumers[0].site.path.startswith(prefix)
    }


# (members, kind and path of the producer) of the first block; "-" and a reason where none is.
EXPECTED = {
    "opt": {
        "q_proj k_proj v_proj": ("norm", "self_attn_layer_norm"),
        "out_proj": ("rows", "self_attn.v_proj"),
        "fc1": ("norm", "final_layer_norm"),
        "fc2": ("rows", "fc1"),
    },
    "opt-no-bias": {
        "q_proj k_proj v_proj": ("norm", "self_attn_layer_norm"),
        "out_proj": ("rows", "self_attn.v_proj"),
        "fc1": ("norm", "final_layer_norm"),
        "fc2": ("rows", "fc1"),
    },
    "opt-post-layernorm": {
        "q_proj k_proj v_proj": ("-", "a sum"),
        "out_proj": ("rows", "self_attn.v_proj"),
        "fc1": ("-", "also feeds add"),
        "fc2": ("rows", "fc1"),
    },
    "gpt2": {
        "c_attn": ("norm", "ln_1"),
        "c_proj": ("-", "also feeds pow"),  # attn.c_proj has the same last name and comes before
        "c_fc": ("norm", "ln_2"),
    },
    "llama": {
        "q_proj k_proj v_proj": ("vector", "input_layernorm.weight"),
        "o_proj": ("rows", "self_attn.v_proj"),
        "gate_proj up_proj": ("vector", "post_attention_layernorm.weight"),
        "down_proj": ("rows", "mlp.up_proj"),
    },
    "phi": {
        "q_proj k_proj v_proj fc1": ("norm", "input_layernorm"),
        "dense": ("rows", "self_attn.v_proj"),
        "fc2": ("-", "also feeds pow"),
    },
    "phi3": {
        "qkv_proj": ("vector", "input_layernorm.weight"),
        "o_proj": ("rows", "self_attn.qkv_proj"),
        "gate_up_proj": ("vector", "post_attention_layernorm.weight"),
        "down_proj": ("rows", "mlp.gate_up_proj"),
    },
    "gpt-neox-parallel": {
        "query_key_value": ("norm", "input_layernorm"),
        "dense": ("rows", "attention.query_key_value"),
        "dense_h_to_4h": ("norm", "post_attention_layernorm"),
        "dense_4h_to_h": ("-", "GELU"),
    },
    "olmo2": {
        "q_proj k_proj v_proj": ("-", "the embedding"),
        "o_proj": ("rows", "self_attn.v_proj"),
        "gate_proj up_proj": ("-", "a sum"),
        "down_proj": ("rows", "mlp.up_proj"),
    },
}
EXPECTED |= dict.fromkeys(("llama-eager", "qwen2", "qwen3", "mistral"), EXPECTED["llama"])


@pytest.mark.parametrize("name", EXPECTED)
def test_producers_members_and_reasons(name: str) -> None:
    found = {}
    for members, group in first_block(named(name)).items():
        if group.producer is None:
            assert group.obstacle is not None
            (text,) = [want for key, (_, want) in EXPECTED[name].items() if key == members]
            assert text in group.obstacle.reason
            found[members] = ("-", text)
        else:
            path = group.producer.path
            wanted = EXPECTED[name][members][1]
            found[members] = (group.producer.kind, wanted if path.endswith(wanted) else path)
    assert found == EXPECTED[name]


@pytest.mark.parametrize("name", ["gemma2-eager", "gemma3"])
def test_gains_of_one_plus_w(name: str) -> None:
    gains = [g for g in scale_groups(named(name)) if g.producer and g.producer.kind == "vector"]
    assert gains
    assert {g.producer.offset for g in gains if g.producer} == {1.0}


def test_heads_of_a_group_share_their_channels() -> None:
    """Llama here: 4 heads of 8 on 2 key/value heads; heads 0 and 1 read the first one."""
    group = first_block(named("llama"))["o_proj"]
    heads = group.consumers[0].columns.view(4, 8)
    first, second = torch.arange(8), torch.arange(8, 16)
    assert torch.equal(heads, torch.stack((first, first, second, second)))


def test_values_inside_fused_projections() -> None:
    """GPT-2 keeps V behind Q and K; GPT-NeoX and Bloom interleave them head by head."""
    group = next(g for g in scale_groups(named("gpt2")) if "attn.c_proj" in g.names())
    assert torch.equal(group.consumers[0].columns, torch.arange(64, 96))
    for name in ("gpt-neox-parallel", "bloom"):
        group = next(g for g in scale_groups(named(name)) if g.names().endswith(".dense"))
        heads = torch.arange(4)[:, None] * 24 + 16 + torch.arange(8)
        assert torch.equal(group.consumers[0].columns, heads.flatten())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_is_in_one_group(name: str) -> None:
    gm = named(name)
    members = [c.site.path for group in scale_groups(gm) for c in group.consumers]
    sites = [s.path for s in info(gm).sites if s.role != "embeddings"]
    assert sorted(members) == sorted(sites)
    for group in scale_groups(gm):
        for consumer in group.consumers:
            assert consumer.columns.shape == (consumer.site.shape[1],)
            assert int(consumer.columns.max()) < group.channels


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_function_stays_under_any_positive_scale(name: str) -> None:
    """Each group alone takes random scales over four octaves; the logits stay."""
    gm = clone_sharing_storage(named(name)).double()
    # No padding: in fp64 Bloom's mask is infinite for its fp32 softmax, and a padded row NaN.
    ids = token_ids(2, 11)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = gm(**inputs)
    assert bool(torch.isfinite(expected).all())
    generator = torch.Generator().manual_seed(3)
    for index in range(len(scale_groups(gm))):
        changed = clone_sharing_storage(gm)
        group = scale_groups(changed)[index]
        scale = torch.exp2(4 * torch.rand(group.channels, generator=generator) - 2)
        before = {c.site.path: weight_of(changed, c.site.path) for c in group.consumers}
        rescale(changed, group, scale, "test")
        changed.recompile()
        with torch.no_grad():
            got = changed(**inputs)
        # Scales are applied in fp32: one rounding of each parameter touched.
        error = (got - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, group.names()
        for path, weight in before.items():
            assert not torch.equal(weight, weight_of(changed, path))


def weight_of(gm: GraphModule, path: str) -> Tensor:
    return linear_parameters(gm.get_submodule(path))[0].clone()


def test_a_chosen_code_is_not_lost_silently() -> None:
    gm = clone_sharing_storage(named("opt"))
    path = "model.decoder.layers.0.fc1"
    module = gm.get_submodule(path)
    assert isinstance(module, nn.Linear)
    install(gm, path, CodedLinear(module.weight, module.bias, TensorSpec(integer(8)), {}))
    for members in ("fc1", "fc2"):  # its columns, its rows
        group = first_block(gm)[members]
        with pytest.raises(SchemeError, match=r"fc1: an earlier pass has chosen.*write \+smooth"):
            rescale(gm, group, torch.full((group.channels,), 2.0), "smooth")


def test_scales_must_be_positive_numbers() -> None:
    gm = clone_sharing_storage(named("opt"))
    group = first_block(gm)["fc1"]
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        scale = torch.ones(group.channels)
        scale[5] = bad
        with pytest.raises(NonFiniteError, match=r"test: .*fc1"):
            rescale(gm, group, scale, "test")
