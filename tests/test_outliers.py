"""Planted outliers: they are there, and the float function is what it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.outliers import Kind, OutlierPlan, PlantedOutlier, plant_outliers
from fxquant.evaluation.builtin_text import builtin_text
from tests.models import small_opt

# Consumers of each producer, by the end of its path.
CONSUMERS = {
    "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "final_layer_norm": ("fc1",),
    "fc1": ("fc2",),
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def tiny_opt(**changes: Any) -> OPTForCausalLM:
    """A random OPT of two blocks whose norms and biases are not at their initial ones and zeros."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    few = {"vocab_size": 40, "num_attention_heads": 2, "max_position_embeddings": 32}
    model = OPTForCausalLM(OPTConfig(**{**sizes, **few, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def without_norm_parameters(model: OPTForCausalLM) -> OPTForCausalLM:
    """The model with norms as in OPT-175B, which transformers builds but cannot initialize."""
    for block in model.model.decoder.layers:
        block.self_attn_layer_norm = nn.LayerNorm(16, elementwise_affine=False)
        block.final_layer_norm = nn.LayerNorm(16, elementwise_affine=False)
    return model


def tiny_llama(model: type[nn.Module], config: Callable[..., Any]) -> nn.Module:
    """A random model of two blocks, of an architecture with Llama's configuration."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    few = {"vocab_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    return model(config(**sizes, **few)).eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def inputs_of_linears(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The input of each linear, [tokens, channels], by the linear's path."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: found.update({path: inputs[0].detach().flatten(0, -2)})

    handles = [
        module.register_forward_pre_hook(keep(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


def consumers(outlier: PlantedOutlier) -> list[str]:
    block, _, producer = outlier.path.rpartition(".")
    return [f"{block}.{consumer}" for consumer in CONSUMERS[producer]]


@pytest.fixture(scope="module")
def opt() -> OPTForCausalLM:
    return small_opt()[0]


@pytest.fixture(scope="module")
def ids() -> Tensor:
    tokens = small_opt()[1](builtin_text("evaluation"))["input_ids"]
    return torch.tensor(tokens[: 2 * 64]).view(2, 64)


# The function stays


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kinds", [("gain",), ("relu",), ("gain", "relu")])
def test_gains_change_no_bit_of_the_logits(
    opt: OPTForCausalLM, ids: Tensor, kinds: tuple[Kind, ...], seed: int
) -> None:
    plan = OutlierPlan(seed, kinds, channel_share=0.02, gain_range=(8, 128))
    planted_model, planted = plant_outliers(opt, plan)
    assert {outlier.kind for outlier in planted} == set(kinds)
    assert torch.equal(logits(planted_model, ids), logits(opt, ids))


@pytest.mark.parametrize("seed", range(3))
def test_shifts_change_the_logits_only_in_their_rounding(
    opt: OPTForCausalLM, ids: Tensor, seed: int
) -> None:
    plan = OutlierPlan(seed, ("shift",))
    exact = logits(copy.deepcopy(opt).double(), ids)
    rounding = (logits(opt, ids) - exact).abs().max().item()
    # A norm's output of about 1 becomes 1 + c, and c is added once more in the consumers' biases:
    # no term of a sum, and so no rounding error, grows by more than 1 + 2c.
    tolerance = (1 + 2 * plan.shift_range[1]) * rounding

    planted_model, planted = plant_outliers(opt, plan)
    assert len(planted) == 2 * opt.config.num_hidden_layers
    assert (logits(planted_model, ids) - exact).abs().max() < tolerance

    in_double, _ = plant_outliers(copy.deepcopy(opt).double(), plan)
    assert (logits(in_double, ids) - exact).abs().max() < tolerance * 2.0 ** (24 - 53)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (LlamaForCausalLM, LlamaConfig),
        (Qwen2ForCausalLM, Qwen2Config),
        (Qwen3ForCausalLM, Qwen3Config),
    ],
)
def test_llama_like_blocks_take_gains_and_no_shifts(
    model: type[nn.Module], config: Callable[..., Any]
) -> None:
    original = tiny_llama(model, config)
    some_ids = torch.randint(40, (2, 16))
    planted_model, planted = plant_outliers(original, OutlierPlan(channel_share=0.1))
    assert {outlier.kind for outlier in planted} == {"gain"}
    assert len(planted) == 2 * 2 * 2  # blocks, norms, channels
    assert torch.equal(logits(planted_model, some_ids), logits(original, some_ids))
    before, after = (
        inputs_of_linears(original, some_ids),
        inputs_of_linears(planted_model, some_ids),
    )
    for outlier in planted:
        for path in consumers(outlier):
            channel = outlier.channel
            assert torch.equal(after[path][:, channel], outlier.value * before[path][:, channel])


PLANS = st.builds(
    OutlierPlan,
    seed=st.integers(0, 2**32),
    kinds=st.sets(st.sampled_from(["gain", "relu"]), min_size=1).map(tuple),
    channel_share=st.floats(0.01, 1),
    layer_share=st.floats(0.01, 1),
    gain_range=st.sampled_from([(2, 2), (2, 64), (16, 1024)]),
)


@pytest.fixture(scope="module")
def original() -> OPTForCausalLM:
    return tiny_opt()


@settings(deadline=None, max_examples=30)
@given(plan=PLANS)
def test_any_plan_of_gains_is_exact_and_keeps_to_its_shares(
    original: OPTForCausalLM, plan: OutlierPlan
) -> None:
    some_ids = torch.arange(24).view(2, 12)
    planted_model, planted = plant_outliers(original, plan)
    assert torch.equal(logits(planted_model, some_ids), logits(original, some_ids))
    assert all(plan.gain_range[0] <= outlier.value <= plan.gain_range[1] for outlier in planted)
    assert len(set(planted)) == len(planted)
    layers = max(1, round(2 * plan.layer_share))
    per_norm, per_hidden = (max(1, round(width * plan.channel_share)) for width in (16, 32))
    per_layer = ("gain" in plan.kinds) * 2 * per_norm + ("relu" in plan.kinds) * per_hidden
    assert len(planted) == layers * per_layer


# The outliers are there


def test_planted_channels_grow_as_recorded(opt: OPTForCausalLM, ids: Tensor) -> None:
    before = inputs_of_linears(opt, ids)
    for kind in ("gain", "relu"):
        model, planted = plant_outliers(opt, OutlierPlan(kinds=(kind,), gain_range=(64, 128)))
        after = inputs_of_linears(model, ids)
        for outlier in planted:
            for path in consumers(outlier):
                x, grown = (inputs[path][:, outlier.channel] for inputs in (before, after))
                assert torch.equal(grown, outlier.value * x)
                if kind == "gain":  # a neuron may be silent, and stays so
                    assert grown.abs().max() > 20 * before[path].abs().median()


def test_shifted_channels_move_as_recorded(opt: OPTForCausalLM, ids: Tensor) -> None:
    model, planted = plant_outliers(opt, OutlierPlan(kinds=("shift",)))
    before, after = inputs_of_linears(opt, ids), inputs_of_linears(model, ids)
    signs = {outlier.channel: outlier.value > 0 for outlier in planted}
    for outlier in planted:
        assert 20 <= abs(outlier.value) <= 60
        assert signs[outlier.channel] == (outlier.value > 0)
        for path in consumers(outlier):
            moved = after[path][:, outlier.channel] - before[path][:, outlier.channel]
            torch.testing.assert_close(
                moved, torch.full_like(moved, outlier.value), atol=1e-4, rtol=0
            )


def test_a_shift_comes_before_a_gain_in_the_same_channel(opt: OPTForCausalLM, ids: Tensor) -> None:
    model, planted = plant_outliers(opt, OutlierPlan())
    before, after = inputs_of_linears(opt, ids), inputs_of_linears(model, ids)
    for shift, gain in zip(planted[::2], planted[1::2], strict=True):
        assert (shift.kind, gain.kind) == ("shift", "gain")
        assert (gain.path, gain.channel) == (shift.path, shift.channel)
        for path in consumers(gain):
            expected = gain.value * (before[path][:, gain.channel] + shift.value)
            torch.testing.assert_close(after[path][:, gain.channel], expected, atol=1e-3, rtol=0)


def test_the_same_plan_gives_the_same_outliers(opt: OPTForCausalLM) -> None:
    first, planted = plant_outliers(opt, OutlierPlan(seed=7))
    second, again = plant_outliers(opt, OutlierPlan(seed=7))
    assert planted == again
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert plant_outliers(opt, OutlierPlan(seed=8))[1] != planted


def test_the_model_handed_in_is_untouched(opt: OPTForCausalLM) -> None:
    before = {name: value.clone() for name, value in opt.state_dict().items()}
    planted_model, _ = plant_outliers(opt, OutlierPlan(kinds=("gain", "shift", "relu")))
    for name, value in opt.state_dict().items():
        assert torch.equal(value, before[name]), name
    ours = {value.data_ptr() for value in planted_model.state_dict().values()}
    assert not ours & {value.data_ptr() for value in opt.state_dict().values()}
    assert planted_model.lm_head.weight is planted_model.model.decoder.embed_tokens.weight


# float16


def coarse_half_opt() -> OPTForCausalLM:
    """A float16 model whose weights leave room below: multiples of 1/32."""
    model = tiny_opt()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 32).round() / 32)
    return model.half()


def test_gains_are_exact_in_float16_where_the_weights_have_room() -> None:
    original = coarse_half_opt()
    some_ids = torch.arange(24).view(2, 12)
    plan = OutlierPlan(kinds=("gain", "relu"), gain_range=(2, 16))
    planted_model, planted = plant_outliers(original, plan)
    assert planted
    assert planted_model.dtype is torch.float16
    assert torch.equal(logits(planted_model, some_ids), logits(original, some_ids))


def test_a_float16_weight_that_would_underflow_is_refused(opt: OPTForCausalLM) -> None:
    plan = OutlierPlan(kinds=("gain",), gain_range=(128, 128))
    with pytest.raises(ValueError, match=r"column \d+: times 0.0078125 does not fit torch.float16"):
        plant_outliers(copy.deepcopy(opt).half(), plan)


def test_relu_needs_no_parameters_in_the_norm_before() -> None:
    original = without_norm_parameters(tiny_opt(enable_bias=False))
    some_ids = torch.arange(24).view(2, 12)
    planted_model, planted = plant_outliers(original, OutlierPlan(kinds=("relu",)))
    assert len(planted) == 2
    assert torch.equal(logits(planted_model, some_ids), logits(original, some_ids))


@pytest.mark.parametrize("kind", ["gain", "relu"])
def test_a_float16_activation_that_could_overflow_is_refused(kind: Kind) -> None:
    model = coarse_half_opt()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.where(parameter < 0, -1.0, 1.0))
    plan = OutlierPlan(kinds=(kind,), gain_range=(2**14, 2**14))
    with pytest.raises(ValueError, match=r"outputs may reach .* more than torch.float16 holds"):
        plant_outliers(model, plan)


# Refusals


def test_a_post_layernorm_opt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.0: a post-LayerNorm block"):
        plant_outliers(tiny_opt(do_layer_norm_before=False), OutlierPlan())


def test_a_model_without_known_blocks_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no module with a child `self_attn`"):
        plant_outliers(model, OutlierPlan())


def test_a_block_with_further_norms_is_refused() -> None:
    model = tiny_llama(Gemma2ForCausalLM, Gemma2Config)
    with pytest.raises(ValueError, match=r"layers\.0: .*neither.*pre_feedforward_layernorm"):
        plant_outliers(model, OutlierPlan())


def test_a_shared_weight_is_refused() -> None:
    model = tiny_opt()
    first, second = model.model.decoder.layers
    second.fc1.weight = first.fc1.weight
    with pytest.raises(ValueError, match=r"final_layer_norm: .* shares its weight"):
        plant_outliers(model, OutlierPlan())


def test_bfloat16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.bfloat16"):
        plant_outliers(tiny_opt().bfloat16(), OutlierPlan())


@pytest.mark.parametrize(
    ("model", "plan"),
    [
        (lambda: tiny_llama(LlamaForCausalLM, LlamaConfig), OutlierPlan(kinds=("shift", "relu"))),
        (lambda: tiny_llama(GemmaForCausalLM, GemmaConfig), OutlierPlan()),  # x * (1 + weight)
        (lambda: tiny_opt(enable_bias=False), OutlierPlan(kinds=("shift",))),
        (lambda: without_norm_parameters(tiny_opt()), OutlierPlan()),
        (lambda: tiny_opt(activation_function="gelu"), OutlierPlan(kinds=("relu",))),
        (tiny_opt, OutlierPlan(channel_share=0)),
        (tiny_opt, OutlierPlan(layer_share=0)),
        (tiny_opt, OutlierPlan(kinds=())),
    ],
)
def test_a_plan_that_would_plant_nothing_is_refused(
    model: Callable[[], nn.Module], plan: OutlierPlan
) -> None:
    with pytest.raises(ValueError, match=r"would plant nothing: \w+ can take \["):
        plant_outliers(model(), plan)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kinds": ("gain", "scale")}, r"unknown \['scale'\]; known: \['shift', 'gain', 'relu'\]"),
        ({"channel_share": 1.5}, "channel_share must be between 0 and 1, not 1.5"),
        ({"layer_share": -0.1}, "layer_share"),
        ({"gain_range": (3, 8)}, "powers of two"),
        ({"gain_range": (1, 8)}, "powers of two"),
        ({"gain_range": (8, 4)}, "powers of two"),
        ({"shift_range": (0.0, 8.0)}, "positive and rising"),
        ({"shift_range": (9.0, 8.0)}, "positive and rising"),
        ({"shift_range": (9.0, float("nan"))}, "positive and rising"),
    ],
)
def test_a_plan_says_what_is_wrong_with_it(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OutlierPlan(**wrong)
