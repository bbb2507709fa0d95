"""The oracle is the user's model as it was handed over: taken as it is, or refused by name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import fxquant
from fxquant.errors import ModelError, NonFiniteError, TracingError
from fxquant.ir.graph import info
from tests.architectures import gpt2, llama, opt, padding_mask, token_ids
from tests.test_tracing import EXACT, difference, unchanged

DOWN = "model.layers.1.mlp.down_proj"
MLP = "model.layers.0.mlp"


def agrees(model: PreTrainedModel) -> None:
    """The graph computes what the model does, also on shapes that no probe has."""
    with unchanged(model):
        gm = fxquant.trace(model)
    for batch, length, padding in ((3, 11, "both"), (1, 5, "left"), (2, 33, "none")):
        mask = padding_mask(batch, length, padding)
        found = difference(model.eval(), gm, token_ids(batch, length, seed=9), mask)
        assert found <= EXACT[torch.float32]


# Hooks and patched forwards


def _forward_hook(model: PreTrainedModel) -> None:
    model.get_submodule(MLP).register_forward_hook(lambda _, __, output: 3 * output)


def _leaf_hook(model: PreTrainedModel) -> None:
    model.get_submodule(DOWN).register_forward_hook(lambda _, __, output: output.mul_(3))


def _pre_hook(model: PreTrainedModel) -> None:
    model.get_submodule(MLP).register_forward_pre_hook(lambda _, args: (2 * args[0],))


def _pre_hook_of_keywords(model: PreTrainedModel) -> None:
    def shifted(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"input_ids": kwargs["input_ids"] + 1}

    model.register_forward_pre_hook(shifted, with_kwargs=True)


def _hook_behind_autograd(model: PreTrainedModel) -> None:
    """No version counter sees it, and it returns nothing."""

    def scaled(_: nn.Module, __: Any, output: Tensor) -> None:
        output.data.mul_(3)

    model.get_submodule(MLP).register_forward_hook(scaled)


def _hook_on_an_output_of_several(model: PreTrainedModel) -> None:
    def swapped(_: nn.Module, __: Any, output: Any) -> None:
        output["logits"] = 2 * output["logits"]

    model.register_forward_hook(swapped)


def _hook_that_clones(model: PreTrainedModel) -> None:
    model.get_submodule(MLP).register_forward_hook(lambda _, __, output: output.clone())


def _patched_leaf(model: PreTrainedModel) -> None:
    down = model.get_submodule(DOWN)
    original = down.forward
    down.forward = lambda x: 3 * original(x)


def _patched_block(model: PreTrainedModel) -> None:
    mlp: Any = model.get_submodule(MLP)
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x))


REFUSED: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "hook": (_forward_hook, rf"^{MLP} has a forward hook \(_forward_hook\.\S+ of .*\.py:\d+\)"),
    "leaf hook": (_leaf_hook, rf"^{DOWN} has a forward hook"),
    "pre-hook": (_pre_hook, rf"^{MLP} has a forward pre-hook"),
    "pre-hook of keywords": (_pre_hook_of_keywords, r"^LlamaForCausalLM has a forward pre-hook"),
    "hook behind autograd": (_hook_behind_autograd, rf"^{MLP} has .*scaled.* it writes into what"),
    "hook on a dict": (
        _hook_on_an_output_of_several,
        r"^Llama\S+ has a .*swapped.* it writes into",
    ),
    "hook that clones": (_hook_that_clones, rf"^{MLP} has a .* it gives its module another value"),
    "forward of a leaf": (_patched_leaf, rf"^{DOWN}: its forward was replaced .* _patched_leaf"),
    "forward of a block": (_patched_block, rf"^{MLP}: its forward was replaced on the instance"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_graph_cannot_carry_is_refused_by_name(what: str) -> None:
    change, message = REFUSED[what]
    model = llama()
    change(model)
    with unchanged(model), pytest.raises(ModelError, match=message):
        fxquant.convert(model, "w8")


@pytest.mark.parametrize("pre", [False, True])
def test_a_global_hook_is_refused(pre: bool) -> None:
    register = (
        nn.modules.module.register_module_forward_pre_hook
        if pre
        else nn.modules.module.register_module_forward_hook
    )
    model = llama()
    handle = register(lambda *_: None)
    try:
        with pytest.raises(ModelError, match=r"^a global forward (pre-)?hook .* every module"):
            fxquant.trace(model)
    finally:
        handle.remove()
    agrees(model)


class Watcher:
    """What people hang on modules to see what they compute."""

    def __init__(self) -> None:
        self.seen: list[Any] = [nn.Parameter(torch.ones(2)) * 2]  # deepcopy refuses such a tensor

    def hook(self, *given: Any) -> None:
        self.seen.append(given[-1])


def _watch(model: PreTrainedModel, watcher: Watcher) -> None:
    block = model.get_submodule("model.layers.1")
    block.register_forward_hook(watcher.hook)
    block.register_forward_hook(watcher.hook, with_kwargs=True)
    model.get_submodule(DOWN).register_forward_hook(functools.partial(watcher.hook, "down"))
    model.get_submodule(MLP).register_forward_pre_hook(watcher.hook)
    model.get_submodule(MLP).register_forward_pre_hook(lambda _, args: args)
    model.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs), with_kwargs=True)
    model.register_forward_hook(lambda _, __, output: output, prepend=True)


@pytest.mark.parametrize("frontend", ["auto", "recorder"])
def test_hooks_that_only_watch_are_let_go_with_a_note(frontend: str) -> None:
    model, watcher = llama(), Watcher()
    _watch(model, watcher)
    with unchanged(model):
        graph = fxquant.trace(model, frontend)
    probes = len(watcher.seen) - 1
    assert probes == 4 * 4  # those of the model, not those of the trace
    noted = [note.site for note in info(graph).notes]
    assert sorted(noted) == sorted(
        ["LlamaForCausalLM"] * 2 + ["model.layers.1"] * 2 + [MLP] * 2 + [DOWN]
    )
    text = "its forward hook (Watcher.hook) only watched the probes: a graph does not call it"
    assert text in {note.text for note in info(graph).notes}
    assert difference(model.eval(), graph, token_ids(3, 11), None) <= EXACT[torch.float32]
    assert len(watcher.seen) - 1 - probes == 4  # a graph does not call them
    assert torch.equal(
        fxquant.convert(model, "w8")(token_ids(2, 7)),
        fxquant.convert(llama(), "w8")(token_ids(2, 7)),
    )


def test_a_hook_that_changes_its_module_is_found_and_named() -> None:
    """It returns nothing and writes nowhere, but what the module computes is another thing."""
    model = llama()

    def louder(module: Any, _: Any) -> None:
        module.act_fn = nn.Identity()

    model.get_submodule(MLP).register_forward_pre_hook(louder)
    with pytest.raises(TracingError, match=rf"a graph calls no hooks, as {MLP} has"):
        fxquant.trace(model)


def test_hooks_for_gradients_are_taken() -> None:
    model = llama()
    model.enable_input_require_grads()
    assert model.get_input_embeddings()._forward_hooks
    agrees(model)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_a_model_that_gave_its_hidden_states_is_taken(asked: str) -> None:
    """transformers 4 leaves each forward on its instance, 5 a hook that does nothing then."""
    model = llama()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(token_ids(1, 4), **{asked: True})
    assert not [note for note in info(fxquant.trace(model)).notes if "hook" in note.text]
    agrees(model)
    setattr(model.config, asked, True)
    agrees(model)
    agrees(model)


def test_a_class_that_was_patched_is_traced_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    kind: Any = type(model.get_submodule(MLP))
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 3 * original(self, x))
    agrees(model)


@pytest.mark.parametrize(("build", "kind"), [(llama, nn.Linear), (gpt2, Conv1D)])
def test_a_linear_layer_that_was_patched_is_refused(
    build: Callable[[], PreTrainedModel], kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, original = build(), kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 3 * original(self, x))
    with pytest.raises(ModelError, match=rf"{kind.__name__}\.forward was replaced"):
        fxquant.convert(model, "w8")


# Weights that are computed at each call


def _pruned(linear: nn.Module) -> None:
    prune.l1_unstructured(linear, "weight", 0.5)


def _pruned_twice(linear: nn.Module) -> None:
    prune.random_unstructured(linear, "weight", 0.2)
    prune.ln_structured(linear, "weight", 0.25, n=2, dim=0)


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _parametrized(linear: nn.Module) -> None:
    parametrize.register_parametrization(linear, "weight", _Doubled())
    parametrize.register_parametrization(linear, "weight", _Doubled())


COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "pruned": _pruned,
    "pruned twice": _pruned_twice,
    "parametrized": _parametrized,
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight norm": nn.utils.weight_norm,
    "old spectral norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("what", COMPUTED)
def test_computed_weights_are_those_of_the_next_call(what: str, ran_before: bool) -> None:
    model = llama()
    for path in (DOWN, "model.layers.0.self_attn.q_proj"):
        COMPUTED[what](model.get_submodule(path))
    if ran_before:
        with torch.no_grad():
            model(token_ids(1, 4))
            for name, parameter in model.named_parameters():
                if any(part in name for part in ("weight_orig", "original", "weight_g")):
                    parameter.mul_(3)  # stale wherever a computed weight was kept
    model.eval()
    agrees(model)
    graph = fxquant.convert(model, "w8")
    assert len([site for site in info(graph).sites if site.role == "linear"]) == 14
    assert graph.get_buffer(f"{DOWN}.weight").dtype == torch.int8


def test_a_parametrized_block_is_not_taken_for_a_leaf() -> None:
    """parametrize gives any module a class of torch.nn's namespace."""
    model = llama()
    norm = model.get_submodule("model.layers.0.input_layernorm")
    parametrize.register_parametrization(norm, "weight", _Doubled())
    agrees(model)


def test_tensors_beside_the_parameters_are_copied_too() -> None:
    """A pruned weight that was computed with a gradient is no leaf, nor is what a module keeps."""
    model = llama()
    mlp: Any = model.get_submodule(MLP)
    weight = mlp.down_proj.weight
    mlp.kept = {"last": [(2 * weight).sum()]}
    agrees(model)
    assert mlp.kept["last"][0].grad_fn is not None


def test_what_cannot_be_copied_is_named() -> None:
    model = llama()
    model.get_submodule(MLP).stream = (item for item in "abc")
    with pytest.raises(ModelError, match=rf"^{MLP}: its attribute stream cannot be copied"):
        fxquant.trace(model)


# Weights that are elsewhere


class _AlignDevicesHook:
    """Stands for accelerate's, which is told by its attribute."""


def test_offloaded_weights_are_refused() -> None:
    model = llama()
    model.get_submodule(MLP)._hf_hook = _AlignDevicesHook()
    with pytest.raises(ModelError, match=rf"^{MLP}: accelerate moves .*AlignDevicesHook"):
        fxquant.trace(model)


def test_weights_on_meta_are_refused() -> None:
    model = llama()
    model.get_submodule(MLP).to("meta")
    with pytest.raises(ModelError, match=rf"^{MLP}\.gate_proj\.weight is on device meta"):
        fxquant.trace(model)


def test_weights_that_are_codes_are_refused() -> None:
    model = llama()
    codes = torch.ones(32, 64, dtype=torch.int8)
    model.get_submodule(DOWN).weight = nn.Parameter(codes, requires_grad=False)
    with pytest.raises(ModelError, match=rf"^{DOWN}\.weight is int8: .* quantized already"):
        fxquant.trace(model)


# Linear layers of other classes


class Transposed(nn.Linear):
    """As Falcon writes it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Own(nn.Module):
    """No nn.Linear at all; its weight lies [K, N]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...k,kn->...n", x, self.weight)


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Clipped(nn.Linear):
    """Linear where its input is small."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-8, 8))


def _as(kind: type[nn.Linear]) -> Callable[[nn.Linear], nn.Module]:
    def change(linear: nn.Linear) -> nn.Module:
        linear.__class__ = kind
        return linear

    return change


@pytest.mark.parametrize(
    ("change", "is_site"),
    [(_as(Transposed), True), (Own, True), (_as(Tripled), False), (_as(Clipped), False)],
)
def test_linear_layers_are_told_by_what_they_compute(
    change: Callable[[nn.Linear], nn.Module], is_site: bool
) -> None:
    model = llama()
    for path in (DOWN, "model.layers.0.self_attn.q_proj"):
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(path, change(linear))
    agrees(model)
    found = info(fxquant.convert(model, "w8"))
    assert (DOWN in {site.path for site in found.sites}) == is_site
    assert (DOWN in {entry.path for entry in found.left_in_float}) != is_site


# Probes


def test_a_model_that_computes_otherwise_for_one_row_is_found() -> None:
    """As Mamba 2, which forgets its mask where the batch has one row."""

    class Forgetful(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if isinstance(x, torch.fx.Proxy) or x.shape[0] > 1 else 2 * x

    model = llama()
    model.get_submodule("model.layers.1.mlp").register_module("act_fn", Forgetful())
    with pytest.raises(
        TracingError,
        match=r"on token ids \[1, 7\] with a padded .* module model\.layers\.1\.mlp\.down_proj",
    ):
        fxquant.trace(model)


@pytest.mark.parametrize("frontend", ["auto", "recorder"])
@pytest.mark.parametrize(
    ("dim", "above", "message"),
    [(0, 5, r"whether batch <= 5"), (1, 100, r"above a length of 100 it computes another way")],
)
def test_a_size_that_no_probe_reaches_decides_nothing(
    dim: int, above: int, message: str, frontend: str
) -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x if x.shape[dim] > above else x

    model = llama(max_position_embeddings=400)
    model.get_submodule("model.layers.1.mlp").register_module("act_fn", Sized())
    with pytest.raises(TracingError, match=message):
        fxquant.trace(model, frontend=frontend)


@pytest.mark.parametrize("frontend", ["auto", "recorder"])
@pytest.mark.parametrize("truth", [False, True])
def test_the_remainder_of_a_length_decides_nothing(truth: bool, frontend: str) -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rest = x.shape[1] % 64
            return 2 * x if (rest if truth else rest == 0) else x

    model = llama(max_position_embeddings=400)
    model.get_submodule("model.layers.1.mlp").register_module("act_fn", Sized())
    with pytest.raises(TracingError, match=r"decides by the size of its input"):
        fxquant.trace(model, frontend=frontend)


@contextlib.contextmanager
def _counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens of each forward of any copy of the model."""
    tokens: list[int] = []
    kind: Any = type(model)
    original = kind.forward

    def forward(self: Any, input_ids: Any = None, **more: Any) -> Any:
        if type(input_ids) is Tensor:  # no fake one, as the recorder has
            tokens.append(input_ids.numel())
        return original(self, input_ids=input_ids, **more)

    kind.forward = forward
    try:
        yield tokens
    finally:
        kind.forward = original


def test_probes_cost_four_short_forwards() -> None:
    model = opt(max_position_embeddings=512)
    with _counted(model) as tokens:
        fxquant.trace(model)
    assert tokens == [52, 7, 1, 67]


def test_a_model_that_fails_by_itself_says_so() -> None:
    model = llama()
    model.model.layers[0].self_attn.head_dim = 5
    with pytest.raises(ModelError, match=r"^LlamaForCausalLM itself fails on token ids \[4, 13\]"):
        fxquant.trace(model)


class Noisy(nn.Module):
    """Dropout that somebody calls whatever the mode is."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


class NoisyWeight(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


@pytest.mark.parametrize("what", ["values", "weight"])
def test_a_model_that_draws_random_numbers_is_told_as_such(what: str) -> None:
    """Not as one that is not causal, or that was traced wrongly."""
    model = llama()
    if what == "values":
        model.get_submodule(MLP).register_module("act_fn", Noisy())
    else:
        parametrize.register_parametrization(model.get_submodule(DOWN), "weight", NoisyWeight())
    with pytest.raises(ModelError, match=r"^LlamaForCausalLM gives other logits each time"):
        fxquant.trace(model)


class Counting(nn.Module):
    def __init__(self, buffer: bool) -> None:
        super().__init__()
        calls = torch.zeros(3)
        if buffer:
            self.register_buffer("calls", calls)
        else:
            self.calls = nn.Parameter(calls)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls[1:].add_(1)
        return x * self.calls[-1]


@pytest.mark.parametrize("buffer", [False, True])
def test_a_model_that_writes_into_itself_is_stopped_before(buffer: bool) -> None:
    """RWKV divides its own weights at the first call in eval mode."""
    model = llama()
    model.get_submodule(MLP).register_module("act_fn", Counting(buffer))
    message = rf"writes into its own {MLP}\.act_fn\.calls when it is called \(aten\.add_"
    with unchanged(model), pytest.raises(ModelError, match=message):
        fxquant.trace(model)


def test_an_overflow_is_named_before_the_trace() -> None:
    model = llama()
    with torch.no_grad():
        model.get_parameter(f"{DOWN}.weight").fill_(1e38)
    with pytest.raises(NonFiniteError, match=r"the float model itself computes NaN"):
        fxquant.trace(model)
