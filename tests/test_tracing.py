"""Tracing: the graph computes what the eager model computes, and the model stays as it was."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

import fxquant
from fxquant.errors import ModelError, NonFiniteError, TracingError
from fxquant.ir.graph import info
from fxquant.passes import NameSites
from tests import architectures
from tests.architectures import (
    ARCHITECTURES,
    WINDOW,
    gpt2,
    llama,
    opt,
    padding_mask,
    token_ids,
)
from tests.environments import by_version, needs_hf_tracer, patched_by_hf_tracer

# Our attention sums in another order than eager attention or sdpa with grouped heads do: about
# ten roundings of 2^-24 on the way to logits of size 10. A wrong mask changes them by half.
EXACT = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@functools.cache
def traced(name: str) -> tuple[PreTrainedModel, GraphModule]:
    """Shared by tests that change neither."""
    model = ARCHITECTURES[name]()
    return model, fxquant.trace(model)


@torch.no_grad()
def difference(
    model: PreTrainedModel, gm: GraphModule, ids: Tensor, mask: Tensor | None = None
) -> float:
    """Largest difference of logits that are not padding, over the largest logit."""
    inputs = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    expected, found = model(**inputs, use_cache=False).logits, gm(**inputs)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    keep = torch.ones_like(ids).bool() if mask is None else mask.bool()
    expected, found = expected[keep].double(), found[keep].double()
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("padding", ["none", "left", "right", "both"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_under_padding(name: str, padding: str) -> None:
    model, gm = traced(name)
    difference_ = difference(model, gm, token_ids(4, 21), padding_mask(4, 21, padding))
    assert difference_ <= EXACT[torch.float32]


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 2), (3, 1), (1, 19), (5, 40)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_without_mask_at_other_shapes(name: str, batch: int, length: int) -> None:
    model, gm = traced(name)
    assert difference(model, gm, token_ids(batch, length)) <= EXACT[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_masks_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    _, gm = traced(name)
    ids, mask = token_ids(3, 11), padding_mask(3, 11, "left")
    with torch.no_grad():
        assert torch.equal(gm(ids, mask.to(dtype)), gm(ids, mask))


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt-neo"])
def test_the_window_slides(name: str) -> None:
    """Two layers see at most 2 (WINDOW - 1) tokens back; otherwise the probe tests nothing."""
    model, gm = traced(name)
    reach = 2 * (WINDOW - 1)
    ids = token_ids(1, 20)
    changed = ids.clone()
    changed[0, 0] = ids[0, 0] % 100 + 1
    with torch.no_grad():
        moved = (gm(ids) - gm(changed))[0].abs().amax(-1)
        eager = (model(ids).logits - model(changed).logits)[0].abs().amax(-1)
    assert bool((moved[:WINDOW] > 1e-3).all())
    if name == "mistral":  # in the others one layer in two attends to everything
        assert bool((moved[reach + 1 :] == 0).all())
    torch.testing.assert_close(moved, eager, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "flags",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ],
)
def test_gpt2s_own_scales(flags: dict[str, bool], attention: str) -> None:
    """transformers 4 hands them to no attention function; its "sdpa" computes without them."""
    model = gpt2(attention=attention, **flags)
    gm = fxquant.trace(model)
    assert (
        difference(model, gm, token_ids(3, 17), padding_mask(3, 17, "left")) <= EXACT[model.dtype]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["opt", "opt-post-layernorm", "gpt2", "llama", "gemma2-eager"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = ARCHITECTURES[name]().to(dtype)
    gm = fxquant.trace(model)
    assert difference(model, gm, token_ids(3, 17), padding_mask(3, 17, "left")) <= EXACT[dtype]


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "gpt-neo", "bloom"])
def test_no_device_in_the_graph(name: str) -> None:
    """A device constant would pin the graph to the machine that traced it."""
    seen: list[object] = []
    for node in traced(name)[1].graph.nodes:
        torch.fx.node.map_aggregate((node.args, node.kwargs), seen.append)
    assert not [value for value in seen if isinstance(value, torch.device)]
    assert not {"cpu", "cuda", "meta"} & {value for value in seen if isinstance(value, str)}


# The model's own state


def mixed_modes(model: PreTrainedModel) -> None:
    """Train and eval mode in turns, an unusual configuration, a hook."""
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 0
    model.config.use_cache = True


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything of a model, and of the process, that tracing could disturb."""
    modules = dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {
            name: [*module._forward_hooks, *module._forward_pre_hooks]
            for name, module in modules.items()
        },
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "generation": model.generation_config.to_dict(),
        "tensors": {
            name: (id(t), t.data_ptr(), t._version, t.requires_grad, t.dtype, t.grad is None)
            for name, t in tensors.items()
        },
        "bytes": {name: t.detach().clone() for name, t in model.state_dict().items()},
        "torch": patched_by_hf_tracer(),
        "registries": [
            dict(r._global_mapping) for r in (AttentionInterface, AttentionMaskInterface)
        ],
        "grad mode": torch.is_grad_enabled(),
        "random": torch.get_rng_state(),
    }


@contextlib.contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Assert that the block leaves ``state(model)`` as it was."""
    before = state(model)
    yield
    after = state(model)
    for what, was in before.items():
        if what in ("bytes", "random"):
            torch.testing.assert_close(after[what], was, atol=0, rtol=0, equal_nan=True, msg=what)
        else:
            assert after[what] == was, what


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "gemma2-eager", "gpt-neo"])
def test_the_model_stays_as_it_was(name: str) -> None:
    model = ARCHITECTURES[name]()
    mixed_modes(model)
    with unchanged(model):
        fxquant.trace(model)


def nan_weight() -> PreTrainedModel:
    model = llama()
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 4] = float("nan")
    return model


def overflowing() -> PreTrainedModel:
    """Finite weights, but the product of two gains exceeds float16."""
    model = opt().half()
    for norm in ("self_attn_layer_norm", "final_layer_norm"):
        model.get_parameter(f"model.decoder.layers.1.{norm}.weight").data.fill_(6e4)
    return model


class Fickle(nn.Module):
    """An activation that computes something else under a tracer."""

    def forward(self, x: Tensor) -> Tensor:
        return x if isinstance(x, torch.fx.Proxy) else torch.tanh(x)


def fickle() -> PreTrainedModel:
    model = llama()
    model.get_submodule("model.layers.1.mlp").register_module("act_fn", Fickle())
    return model


# What fails and how it says so; the first two fail in the Hugging Face tracer alone.
FAILURES: list[Any] = [
    pytest.param(
        *(fickle, TracingError, r"first at module model\.layers\.1\.mlp\.down_proj"),
        marks=needs_hf_tracer,
    ),
    (nan_weight, NonFiniteError, r"model\.layers\.1\.mlp\.up_proj\.weight: .*NaN"),
    (overflowing, NonFiniteError, r"model\.decoder\.layers\.1\.\S+: the float model itself"),
]


@pytest.mark.parametrize(("build", "error", "message"), FAILURES)
def test_failures_name_the_module_and_change_nothing(
    build: Callable[[], PreTrainedModel], error: type[Exception], message: str
) -> None:
    model = build()
    mixed_modes(model)
    with unchanged(model), pytest.raises(error, match=message):
        fxquant.trace(model, frontend=by_version("hf", "recorder"))


@pytest.mark.parametrize("build", [opt, llama])
def test_a_forgotten_mask_is_found_at_the_first_attention(
    build: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attention function drops its mask: caught, and named at what reads attention first."""
    from fxquant.frontends import attention

    real = attention.attention_like

    def forgetful(implementation: str | None) -> Callable[..., Any]:
        compute = real(implementation)

        def without_mask(module: Any, q: Any, k: Any, v: Any, mask: Any, **rest: Any) -> Any:
            return compute(module, q, k, v, torch.ones_like(mask, dtype=torch.bool), **rest)

        return without_mask

    monkeypatch.setattr(attention, "attention_like", forgetful)
    model = build()
    projection = "out_proj" if build is opt else "o_proj"
    with pytest.raises(
        TracingError, match=rf"first at module \S+layers\.0\.self_attn\.{projection}"
    ):
        fxquant.trace(model)


# The graph's leaves


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_leaves_are_new_modules_over_the_same_storage(name: str) -> None:
    model, gm = traced(name)
    targets = [str(node.target) for node in gm.graph.nodes if node.op == "call_module"]
    assert targets
    for path in targets:
        ours, theirs = gm.get_submodule(path), model.get_submodule(path)
        assert ours is not theirs
        assert type(ours).__name__ == type(theirs).__name__
    assert not {id(m) for m in gm.modules()} & {id(m) for m in model.modules()}
    originals = dict(model.named_parameters(remove_duplicate=False))
    ours_ = dict(gm.named_parameters(remove_duplicate=False))
    assert ours_
    for path, parameter in ours_.items():
        assert parameter is not originals[path]
        assert parameter.data_ptr() == originals[path].data_ptr()


@pytest.mark.parametrize("name", ["opt", "opt-untied", "gpt2", "llama", "gemma3"])
def test_ties_are_kept(name: str) -> None:
    model, gm = traced(name)
    facts = info(gm)
    head, embeddings = gm.get_submodule(str(facts.head)), gm.get_submodule(str(facts.embeddings))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (name in ("opt", "gpt2", "gemma3"))
    assert (head.weight is embeddings.weight) == tied


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sites_are_the_linears_of_the_blocks(name: str) -> None:
    model, gm = traced(name)
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    paths = {id(module): path for path, module in model.named_modules()}
    expected = {
        paths[id(part)]
        for part in blocks.modules()
        if isinstance(part, nn.Linear | hf.pytorch_utils.Conv1D)
    }
    named = info(NameSites()(gm))
    sites = named.sites
    assert {site.path for site in sites if site.role == "linear"} == expected
    # An embedding that scales what it looks up (Gemma 3) is no site, but must be listed.
    listed = {site.path for site in sites} | {entry.path for entry in named.left_in_float}
    assert {named.head, named.embeddings} <= listed
    for site in sites:
        weight = model.get_submodule(site.path).weight
        assert isinstance(weight, Tensor)
        conv1d = isinstance(model.get_submodule(site.path), hf.pytorch_utils.Conv1D)
        assert site.shape == tuple(weight.shape[::-1] if conv1d else weight.shape)


CHANGES: dict[str, Callable[[GraphModule], object]] = {
    "half": lambda gm: gm.half(),
    "to": lambda gm: gm.to(torch.float64),
    "train": lambda gm: gm.train(),
    "requires_grad": lambda gm: gm.requires_grad_(True),
    "load": lambda gm: gm.load_state_dict(gm.state_dict(), assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("build", [opt, gpt2])
def test_changing_the_graph_leaves_the_model(
    build: Callable[[], PreTrainedModel], change: str
) -> None:
    model = build()
    gm = fxquant.trace(model)
    with unchanged(model):
        CHANGES[change](gm)


@pytest.mark.parametrize(
    ("build", "rates"),
    [
        (opt, {"dropout": 0.1, "attention_dropout": 0.1}),
        (gpt2, {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
        (llama, {"attention_dropout": 0.1}),
    ],
)
def test_dropout_is_left_out(
    build: Callable[..., PreTrainedModel], rates: dict[str, float]
) -> None:
    model = build(**rates).train()
    gm = fxquant.trace(model).train()
    assert not [node for node in gm.graph.nodes if "dropout" in str(node.target)]
    ids = token_ids(2, 9)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
        assert torch.equal(gm(ids), gm(ids))
    assert difference(model.eval(), gm, ids) <= EXACT[torch.float32]


def test_gradients_do_not_reach_the_model() -> None:
    model = opt()
    logits = fxquant.trace(model)(token_ids(1, 5))
    assert not logits.requires_grad


# What is not a causal LM

_ENCODER = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_T5 = {"vocab_size": 99, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16}

NOT_CAUSAL_LM: dict[str, tuple[Callable[[], object], str]] = {
    "module": (lambda: nn.Linear(2, 2), "Linear is not a Hugging Face model"),
    "text": (lambda: "facebook/opt-125m", "str is not a Hugging Face model"),
    "encoder": (
        lambda: hf.BertForMaskedLM(hf.BertConfig(**_ENCODER, intermediate_size=16)),
        "BertForMaskedLM is not a causal language model: load it with AutoModelForCausalLM",
    ),
    "headless": (lambda: opt().model, "OPTModel is not a causal language model"),
    "classifier": (
        lambda: hf.GPT2ForSequenceClassification(gpt2().config),
        "GPT2ForSequenceClassification is not a causal language model",
    ),
    "encoder-decoder": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
        "T5ForConditionalGeneration is not a causal language model",
    ),
}


@pytest.mark.parametrize("what", NOT_CAUSAL_LM)
def test_not_a_causal_lm(what: str) -> None:
    build, message = NOT_CAUSAL_LM[what]
    with pytest.raises(ModelError, match=message):
        fxquant.trace(build())


@pytest.mark.parametrize("version", ["4.52.2", "4.52.0", "4.52"])
def test_broken_transformers_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Lazy loading leaves two module objects called transformers; this is the one that is read.
    monkeypatch.setattr("fxquant.frontends.tracing.transformers.__version__", version)
    with pytest.raises(ModelError, match=rf"transformers {version} computes OPT wrongly.*4\.57\.6"):
        fxquant.trace(opt())


def test_infinite_weight_names_the_parameter() -> None:
    model = gpt2()
    model.get_parameter("transformer.h.0.mlp.c_fc.bias").data[1] = float("inf")
    with pytest.raises(NonFiniteError, match=r"transformer\.h\.0\.mlp\.c_fc\.bias"):
        fxquant.trace(model)


def test_builders_are_deterministic_and_lively() -> None:
    """The tests above compare logits: these must differ from token to token and seed to seed."""
    first, again, other = (architectures.opt(seed) for seed in (0, 0, 1))
    ids = token_ids(2, 9)
    with torch.no_grad():
        logits = [model(ids).logits for model in (first, again, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=0.5)
    assert float(logits[0].std(dim=(0, 1)).min()) > 0.1


def test_an_encoder_that_loads_as_a_causal_lm_is_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.5,
    )
    with pytest.raises((ModelError, TracingError), match="BertLMHeadModel"):
        fxquant.trace(BertLMHeadModel(config).eval())
