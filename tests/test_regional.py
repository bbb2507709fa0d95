"""Graphs whose decoder blocks are compiled once for all that are alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxquant
from fxquant.errors import GraphCallError, GraphError
from fxquant.run import regional
from fxquant.run.regional import compiled_blocks
from tests.architectures import VOCABULARY, gpt2, llama, opt, token_ids
from tests.environments import by_version

FAMILIES = {"llama": llama, "opt": opt, "gpt2": gpt2}
SCHEMES = ("fp", "w8a8-dynamic-token", "w8a8-static-asym:absmax", "w4-g16")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., Any]]:
    """What would be compiled, which runs as it is: the cuts alone are tried, to the same bits."""
    asked: list[Callable[..., Any]] = []

    def compile_(function: Callable[..., Any], options: object) -> Callable[..., Any]:
        asked.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    return asked


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("level", ["integer", "kernels"])
def test_blocks_on_their_own_leaves_are_the_graph(
    family: str, scheme: str, level: str, uncompiled: list[Callable[..., Any]]
) -> None:
    if scheme == "fp" and level == "kernels":
        pytest.skip("a float graph has no kernels")
    batches = [token_ids(2, 9)]
    graph = fxquant.convert(FAMILIES[family](), scheme, calibration=batches, level=level)
    found = compiled_blocks(graph)
    # The recorder may put a first block apart that makes what all read.
    assert found.kinds == len(uncompiled) <= by_version(1, 2)
    for batch, length in ((1, 5), (3, 12)):
        ids = token_ids(batch, length, seed=length)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        expected = graph(input_ids=ids, attention_mask=mask)
        # The head may take another GEMM.
        assert torch.allclose(found(ids, mask), expected, atol=1e-5)
        assert torch.allclose(found(ids), graph(input_ids=ids), atol=1e-5)


@torch.no_grad()
def test_blocks_that_differ_are_kinds_of_their_own(uncompiled: list[Callable[..., Any]]) -> None:
    scheme = '{"scheme": "w8a8-dynamic-token", "overrides": {"*.layers.0.mlp.down_proj": "w8"}}'
    graph, ids = fxquant.convert(llama(), scheme), token_ids(2, 9)
    found = compiled_blocks(graph)
    assert found.kinds == len(uncompiled) == 2
    assert torch.allclose(found(ids), graph(input_ids=ids), atol=1e-5)


@torch.no_grad()
def test_a_changed_leaf_is_seen(uncompiled: list[Callable[..., Any]]) -> None:
    graph, ids = fxquant.trace(llama()), token_ids(1, 7)
    found = compiled_blocks(graph)
    before = found(ids)
    graph.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(-2)
    assert not torch.allclose(found(ids), before)
    assert torch.allclose(found(ids), graph(input_ids=ids), atol=1e-5)


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GraphError, match="is a model, and a graph is needed"):
        compiled_blocks(llama())
    graph = fxquant.trace(llama())
    with monkeypatch.context() as patch:
        patch.setattr(regional, "is_streamed", lambda gm: True)
        with pytest.raises(GraphError, match="reads its leaves from files"):
            compiled_blocks(graph)

    def failing(*_: Any) -> Any:
        raise torch._dynamo.exc.BackendCompilerFailed(
            *("inductor", RuntimeError("no C++ compiler")), None
        )

    monkeypatch.setattr(torch, "compile", lambda function, options: failing)
    with pytest.raises(GraphCallError, match=r"cannot compile a block.*no C\+\+ compiler"):
        compiled_blocks(graph)(token_ids(1, 5))


@torch.no_grad()
def test_calls_are_refused_as_the_graphs_are(uncompiled: list[Callable[..., Any]]) -> None:
    graph, ids = fxquant.convert(llama(), "w8a8-dynamic-token"), token_ids(2, 9)
    found = compiled_blocks(graph)
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = (
        ((ids[:0],), {}),
        ((ids[0],), {}),
        ((ids.float(),), {}),
        ((ids.tolist(),), {}),
        ((ids, torch.ones(2, 8)), {}),
        ((ids, torch.ones(2, 1, 9, 9)), {}),
        ((), {}),
        ((ids,), {"labels": ids}),
        ((ids,), {"run": ids}),
        ((ids,), {"input_ids": ids}),
    )
    for args, kwargs in calls:
        with pytest.raises(GraphCallError) as wanted:
            graph(*args, **kwargs)
        with pytest.raises(GraphCallError) as told:
            found(*args, **kwargs)
        assert str(told.value) == str(wanted.value)
    with pytest.raises(GraphCallError, match="cannot be computed here"):
        found(ids + VOCABULARY)
    assert torch.allclose(found(ids.int(), token_type_ids=ids), graph(ids), atol=1e-5)


def test_a_block_that_cannot_be_computed_is_no_compilers_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: Any) -> Any:
        raise torch._dynamo.exc.TorchRuntimeError("dtypes differ")

    monkeypatch.setattr(torch, "compile", lambda function, options: failing)
    graph = fxquant.trace(llama())
    found, ids = compiled_blocks(graph), token_ids(1, 5)
    with pytest.raises(GraphCallError, match="dtypes differ; the graph itself runs uncompiled"):
        found(ids)
    graph.get_submodule("model.layers.0.mlp.down_proj").half()
    with pytest.raises(GraphCallError, match="the graph's tensors do not go together"):
        found(ids)


def test_options_are_the_compilers_own() -> None:
    """They are names of inductor's, which torch.compile checks, and nothing outside sees them."""
    before = torch._inductor.config.get_config_copy()
    assert regional._OPTIONS.keys() <= before.keys()
    compiled_blocks(fxquant.trace(llama()))
    assert torch._inductor.config.get_config_copy() == before


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("scheme", ["fp", "w8a8-dynamic-token"])
def test_compiled_blocks_give_the_graphs_logits(scheme: str) -> None:
    graph = fxquant.convert(llama(), scheme)
    found = compiled_blocks(graph)
    for batch, length in ((1, 9), (2, 17), (2, 140)):
        ids = token_ids(batch, length, seed=length)
        logits = found(ids)
        assert logits.shape == (batch, length, VOCABULARY)
        # A code next to a tie may fall on its other side: one step of one input of many.
        off = (logits - graph(input_ids=ids)).abs()
        assert off.mean() < (1e-5 if scheme == "fp" else 1e-3)
        assert off.max() < (1e-4 if scheme == "fp" else 1e-1)
