"""Attention without a mask where none is given, and with the model's own where it has another."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, symbolic_trace
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import fxquant
from fxquant.analysis.inspection.formulas import formula
from fxquant.frontends.masks import fuse_masks
from fxquant.frontends.streaming import stream
from fxquant.ir.functions import attended_keys
from fxquant.ir.legal_forms import OPS
from fxquant.run.execution import Executor
from tests.architectures import ARCHITECTURES, VOCABULARY, WINDOW, opt, padding_mask, token_ids
from tests.more_architectures import MORE
from tests.test_tracing import EXACT, difference

EVERY = {**ARCHITECTURES, **MORE}
LENGTH = 23  # no width, window or number of heads
CAUSAL = ("opt", "opt-eager", "gpt2", "llama", "phi", "gpt-neox-parallel", "falcon-new", "lfm2")
WINDOWED = ("mistral", "gemma3", "starcoder2")
MIXED = ("cohere2",)  # layers with a window and layers without
BIASED = ("falcon-alibi",)
FRONT_ENDS = [
    name
    for name in ("hf", "recorder")
    if name == "recorder" or "gemma2-sdpa" in ARCHITECTURES  # transformers 4 has both
]


@functools.cache
def traced(name: str, frontend: str = "auto") -> tuple[PreTrainedModel, GraphModule]:
    model = EVERY[name]()
    return model, fxquant.trace(model, frontend)


class Squares(TorchDispatchMode):
    """Counts the operators that make a tensor [..., LENGTH, LENGTH]."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.shape[-2:] == (LENGTH, LENGTH):
                self.made.append(str(func))
        return result


@torch.no_grad()
def squares(graph: GraphModule, mask: Tensor | None = None) -> list[str]:
    counted = Squares()
    with counted:
        graph(token_ids(2, LENGTH), mask)
    return counted.made


def masks_of(graph: GraphModule) -> list[Any]:
    calls = (node for node in graph.graph.nodes if node.target is OPS.attention.default)
    return [node.args[3] for node in calls]


def is_only_causal(mask: object) -> bool:
    return isinstance(mask, Node) and mask.target is attended_keys


@pytest.mark.parametrize("frontend", FRONT_ENDS)
@pytest.mark.parametrize("name", CAUSAL)
def test_no_square_is_made_without_a_mask(name: str, frontend: str) -> None:
    model, graph = traced(name, frontend)
    masks = masks_of(graph)
    assert masks
    assert all(map(is_only_causal, masks))
    assert squares(graph) == []
    assert squares(graph, padding_mask(2, LENGTH, "left")) != []
    for mask in (None, *(padding_mask(2, LENGTH, side) for side in ("none", "left", "both"))):
        assert difference(model, graph, token_ids(2, LENGTH), mask) <= EXACT[torch.float32]


@pytest.mark.parametrize("scheme", ["w8a8-dynamic-token", "w8a8-static:absmax", "w4-g16+gptq"])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_nor_in_a_quantized_graph(name: str, scheme: str) -> None:
    graph = fxquant.convert(EVERY[name](), scheme, calibration=[token_ids(2, 16)])
    assert squares(graph) == []
    ids = token_ids(2, LENGTH)
    with torch.no_grad():
        known, plain = graph(ids, torch.ones_like(ids)), graph(ids)
    # A score's rounding may turn a code; a mask that is forgotten changes logits by their size.
    assert float((known - plain).norm()) < 0.05 * float(known.norm())


@pytest.mark.parametrize("frontend", FRONT_ENDS)
@pytest.mark.parametrize("name", [*WINDOWED, *MIXED, *BIASED])
def test_windows_and_biases_keep_their_mask(name: str, frontend: str) -> None:
    if name in BIASED and frontend == "hf":
        pytest.skip("transformers' tracer computes it otherwise")
    model, graph = traced(name, frontend)
    masks = masks_of(graph)
    assert len(masks) == 2
    assert sum(map(is_only_causal, masks)) == (1 if name in MIXED else 0)
    assert squares(graph) != []
    assert LENGTH > 2 * WINDOW
    for mask in (None, padding_mask(2, LENGTH, "left"), padding_mask(2, LENGTH, "right")):
        assert difference(model, graph, token_ids(2, LENGTH), mask) <= EXACT[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param("opt", marks=pytest.mark.slow), "llama"])
def test_one_graph_compiled_and_exported(name: str) -> None:
    _, graph = traced(name)
    ids, mask = token_ids(3, LENGTH), padding_mask(3, LENGTH, "both")
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=60)
    free = {0: batch, 1: length}
    small = (token_ids(2, 9), padding_mask(2, 9, "both"))
    for given in (None, mask):
        example = small if given is not None else (small[0], None)
        shapes = {"input_ids": free, "attention_mask": None if given is None else free}
        exported = torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)
        assert torch.equal(exported.module()(ids, given), graph(ids, given))
    compiled = torch.compile(graph, backend="aot_eager", fullgraph=True, dynamic=True)
    for given in (None, mask, None):
        assert torch.equal(compiled(ids, given), graph(ids, given))


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    graph = fxquant.convert(traced("llama")[1], "w8a8-dynamic-token")
    fxquant.save(graph, tmp_path / "saved")
    loaded = fxquant.load(tmp_path / "saved")
    assert all(map(is_only_causal, masks_of(loaded)))
    assert squares(loaded) == []
    for mask in (None, padding_mask(2, LENGTH, "left")):
        ids = token_ids(2, LENGTH)
        assert torch.equal(loaded(ids, mask), graph(ids, mask))


@torch.no_grad()
def test_streamed_and_cut_into_parts(tmp_path: Path) -> None:
    """No mask passes from cut to cut as None."""
    model = opt(num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    graph, streamed = fxquant.trace(model), fxquant.trace(stream(tmp_path, dtype=torch.float32))
    ids = token_ids(2, LENGTH)
    assert torch.equal(streamed(ids), graph(ids))
    run = Executor(streamed)
    place = masks_of(streamed)[-1].users
    cut = run.advance(run.start(input_ids=ids), max(place, key=run.position.__getitem__))
    assert torch.equal(run.advance(cut).values[run.nodes[-1]], graph(ids))


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a8-dynamic-token+attn8", "w8a8-static:absmax+attn8+kv8"])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_written_out_attention_is_causal_without_a_mask(name: str, scheme: str) -> None:
    graph = fxquant.convert(EVERY[name](), scheme, calibration=[token_ids(2, 16)])
    ids = token_ids(2, LENGTH)
    assert torch.equal(graph(ids), graph(ids, torch.ones_like(ids)))


def test_a_padded_query_that_sees_nothing_gives_zero() -> None:
    query, key, value = torch.randn(3, 1, 2, 4, 8).unbind()
    mask = attended_keys(torch.tensor([[0, 0, 1, 1]]))
    out = OPS.attention(query, key, value, mask, None)
    assert not out[:, :, :2].any()
    assert torch.allclose(out[:, :, 2], value[:, :, 2])


# --- masks that look alike ------------------------------------------------------------------------

Mask = Callable[[Any, Tensor, Tensor], Tensor]


class Attends(nn.Module):
    """One head of attention over embeddings, with a mask of its own."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.register_buffer("window", torch.tensor(4096))
        self.register_buffer("seen", torch.ones(64, 64, dtype=torch.bool).tril())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)[:, None]
        mask = self.mask(self, input_ids, attention_mask)
        return scaled_dot_product_attention(x, x, x, attn_mask=mask)


def places(ids: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(ids.shape[1], device=ids.device)
    return at[:, None], at[None, :]


def causal(ids: Tensor, mask: Tensor) -> Tensor:
    query, key = places(ids)
    return (key <= query) & mask[:, None, None, :].to(torch.bool)


def near(ids: Tensor, distance: Any) -> Tensor:
    query, key = places(ids)
    found: Tensor = query - key < distance
    return found


def added(ids: Tensor, mask: Tensor, low: float) -> Tensor:
    return torch.zeros(causal(ids, mask).shape).masked_fill(~causal(ids, mask), low)


def write(into: Any, index: Any, value: Any) -> None:
    """``into[index] = value`` of Proxies, which have no such operator."""
    into.tracer.create_proxy("call_function", operator.setitem, (into, index, value), {})


def written(ids: Tensor, mask: Tensor) -> Tensor:
    found = torch.full((ids.shape[0], 1, ids.shape[1], ids.shape[1]), True)
    write(found, Ellipsis, causal(ids, mask))
    return found


def written_late(ids: Tensor, mask: Tensor) -> Tensor:
    """Through a view, and by what tokens are."""
    found = causal(ids, mask).clone()
    write(found[:, 0], Ellipsis, causal(ids, mask)[:, 0] & (ids > 50)[:, None, :])
    return found


LOWEST = torch.finfo(torch.float32).min
ALIKE: dict[str, Mask] = {
    "boolean": lambda _, ids, mask: causal(ids, mask),
    "added": lambda _, ids, mask: added(ids, mask, LOWEST),
    "infinity added": lambda _, ids, mask: added(ids, mask, float("-inf")),
    "written": lambda _, ids, mask: written(ids, mask),
}
OTHERS: dict[str, Mask] = {
    "a window longer than any probe": lambda _, ids, mask: causal(ids, mask) & near(ids, 4096),
    "a window of a float": lambda _, ids, mask: causal(ids, mask) & near(ids, 16384.0),
    "a short window": lambda _, ids, mask: causal(ids, mask) & near(ids, 2),
    "a window in a buffer": lambda m, ids, mask: causal(ids, mask) & near(ids, m.window),
    "a window as wide as the model": lambda m, ids, mask: (
        causal(ids, mask) & near(ids, 400 * m.embed(ids).shape[-1])
    ),
    "a table of what is seen": lambda m, ids, mask: (
        torch.narrow(torch.narrow(m.seen, 0, 0, ids.shape[1]), 1, 0, ids.shape[1])
        & mask[:, None, None, :].to(torch.bool)
    ),
    "chunks": lambda _, ids, mask: (
        causal(ids, mask) & (places(ids)[0] // 512 == places(ids)[1] // 512)
    ),
    "tokens": lambda _, ids, mask: causal(ids, mask) & (ids != 50)[:, None, None, :],
    "tokens written": lambda _, ids, mask: written_late(ids, mask),
    "padding is seen": lambda _, ids, mask: causal(ids, mask | 1),
    "both sides": lambda _, ids, mask: (
        mask[:, None, None, :].to(torch.bool).expand(-1, 1, ids.shape[1], -1)
    ),
    "a bias": lambda _, ids, mask: added(ids, mask, LOWEST) + (places(ids)[1] - places(ids)[0]),
    "a mild penalty": lambda _, ids, mask: added(ids, mask, -2.0),
}


def fused(mask: Mask) -> tuple[GraphModule, GraphModule]:
    torch.manual_seed(0)
    plain = symbolic_trace(Attends(mask))
    after = copy.deepcopy(plain)
    fuse_masks(after)
    after.graph.eliminate_dead_code()
    after.recompile()
    return plain, after


@pytest.mark.parametrize("name", [*ALIKE, *OTHERS])
def test_only_what_is_causal_is_taken_for_it(name: str) -> None:
    plain, after = fused({**ALIKE, **OTHERS}[name])
    assert [is_only_causal(mask) for mask in masks_of(after)] == [name in ALIKE]
    ids, mask = token_ids(3, LENGTH), padding_mask(3, LENGTH, "right")
    with torch.no_grad():
        assert torch.allclose(after(ids, mask), plain(ids, mask), atol=1e-6)
    if name in ALIKE:
        assert not [n for n in after.graph.nodes if n.target in ("masked_fill", torch.arange)]
        assert "setitem" not in str(after.graph)


def test_a_mask_that_others_read_too_stays_for_them() -> None:
    class Both(Attends):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.embed(input_ids)[:, None]
            mask = written(input_ids, attention_mask)
            out = scaled_dot_product_attention(x, x, x, attn_mask=mask)
            return out + mask.sum(-1, keepdim=True)

    plain = symbolic_trace(Both(lambda *_: torch.empty(0)))
    after = copy.deepcopy(plain)
    fuse_masks(after)
    after.graph.eliminate_dead_code()
    after.recompile()
    assert [is_only_causal(mask) for mask in masks_of(after)] == [True]
    ids, mask = token_ids(3, LENGTH), padding_mask(3, LENGTH, "right")
    with torch.no_grad():
        assert torch.allclose(after(ids, mask), plain(ids, mask), atol=1e-6)


def test_how_it_reads() -> None:
    operands = ["q", "k", "v"]
    words = formula("fxquant.attention", [*operands, "attended_keys", "0.5"], ())
    assert words == "q, k, v, mask=attended_keys, scale=0.5"
    assert formula("fxquant.attention", [*operands, "None", "None"], ()) == "q, k, v, causal"
