"""The executor: runs in pieces equal whole runs, and a cut holds what is needed and no more."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import fxquant
from fxquant.run.execution import Cut, Executor
from tests.architectures import gpt2, llama, opt, padding_mask, token_ids

GRAPHS = {
    "opt float": lambda: fxquant.trace(opt()),
    "gpt2 float": lambda: fxquant.trace(gpt2()),
    "llama integer": lambda: fxquant.convert(llama(), "w8a8-dynamic-token"),
}


@functools.cache
def graph(name: str) -> GraphModule:
    return GRAPHS[name]()


def inputs() -> dict[str, Tensor]:
    return {"input_ids": token_ids(3, 11), "attention_mask": padding_mask(3, 11, "left")}


def needed_later(executor: Executor, position: int) -> set[Node]:
    """By definition: computed before ``position``, read at or after it."""
    before = set(executor.nodes[:position])
    return {n for n in before if any(executor.position[u] >= position for u in n.users)}


@torch.no_grad()
@pytest.mark.parametrize("name", GRAPHS)
def test_whole_runs_equal_the_graph(name: str) -> None:
    executor = Executor(graph(name))
    for batch, length in [(3, 11), (1, 1), (2, 20)]:
        ids = token_ids(batch, length)
        assert torch.equal(executor.run(input_ids=ids), graph(name)(ids))
    assert torch.equal(executor.run(None, **inputs()), graph(name)(**inputs()))


@torch.no_grad()
@pytest.mark.parametrize("name", GRAPHS)
def test_cut_anywhere_and_resume(name: str) -> None:
    """Stop at each node in turn, and go on from the cut; the cut holds exactly what is needed."""
    executor = Executor(graph(name))
    whole = executor.run(None, **inputs())
    cut = executor.start(**inputs())
    for until in executor.nodes[cut.position :]:
        cut = executor.advance(cut, until=until)
        assert cut.position == executor.position[until]
        # The placeholders behind the start may be unread.
        assert set(cut.values) == needed_later(executor, cut.position), until
        if cut.position % 5 == 0:
            assert torch.equal(executor.advance(cut).values[executor.nodes[-1]], whole)
    assert torch.equal(executor.advance(cut).values[executor.nodes[-1]], whole)


@torch.no_grad()
def test_what_is_read_once_is_dropped_at_once() -> None:
    """Memory: at every moment of a run, nothing but the values still needed is alive."""
    executor = Executor(graph("opt float"))
    cuts = []
    cut = executor.start(**inputs())
    for until in executor.nodes[cut.position :]:
        cut = executor.advance(cut, until=until)
        cuts.append(sum(v.numel() for v in cut.values.values() if isinstance(v, Tensor)))
    # Hidden state, mask and a few operands: no more than eight activations of the widest kind,
    # while the whole run computes some hundred.
    assert max(cuts) < 8 * 3 * 11 * 64
    everything = 0

    def count(_: Node, value: Any) -> Any:
        nonlocal everything
        everything += value.numel() if isinstance(value, Tensor) else 0
        return value

    executor.run(count, **inputs())
    assert everything > 10 * max(cuts)


@torch.no_grad()
def test_one_cut_serves_many_runs() -> None:
    """Advancing leaves a cut as it was: try different suffixes from it."""
    executor = Executor(graph("llama integer"))
    middle = executor.nodes[len(executor.nodes) // 2]
    cut = executor.advance(executor.start(**inputs()), until=middle)
    copies = {n: v.clone() if isinstance(v, Tensor) else v for n, v in cut.values.items()}

    def last(from_: Cut, factor: float = 1.0) -> Tensor:
        def scaled(node: Node, value: Any) -> Any:
            return value * factor if node is floats[-1] else value

        value = executor.advance(from_, on_node=scaled).values[executor.nodes[-1]]
        assert isinstance(value, Tensor)
        return value

    floats = [n for n in executor.nodes[:-1] if n.op == "call_module"]
    first, changed, again = last(cut), last(cut, 2.0), last(cut)
    assert torch.equal(first, again)
    assert torch.equal(changed, 2 * first)  # the last module is the head
    assert torch.equal(first, executor.run(None, **inputs()))
    for node, value in copies.items():
        same = cut.values[node]
        assert torch.equal(same, value) if isinstance(value, Tensor) else same == value


@torch.no_grad()
def test_on_node_sees_everything_and_replaces() -> None:
    executor = Executor(graph("opt float"))
    seen: list[Node] = []

    def watch(node: Node, value: Any) -> Any:
        seen.append(node)
        return value

    expected = executor.run(watch, **inputs())
    assert seen == [n for n in executor.nodes if n.op != "placeholder"]
    norm = next(n for n in executor.nodes if str(n.target).endswith("1.final_layer_norm"))
    zeroed = executor.run(lambda n, v: torch.zeros_like(v) if n is norm else v, **inputs())
    assert not torch.allclose(zeroed, expected, atol=0.1)
    # The same, with the norm's own parameters.
    other = fxquant.trace(opt())
    for parameter in other.get_submodule(str(norm.target)).parameters():
        parameter.zero_()
    assert torch.allclose(zeroed, other(**inputs()), atol=1e-5)


@torch.no_grad()
def test_missing_and_unknown_inputs() -> None:
    executor = Executor(graph("opt float"))
    with pytest.raises(TypeError, match="needs input 'input_ids'"):
        executor.run(attention_mask=torch.ones(1, 4))
    with pytest.raises(TypeError, match=r"takes no input \['labels', 'past'\]"):
        executor.run(input_ids=token_ids(1, 4), past=None, labels=token_ids(1, 4))


@torch.no_grad()
@pytest.mark.parametrize("name", GRAPHS)
def test_the_mask_may_be_left_out(name: str) -> None:
    ids = token_ids(2, 9)
    executor = Executor(graph(name))
    assert torch.equal(
        executor.run(input_ids=ids),
        executor.run(input_ids=ids, attention_mask=torch.ones_like(ids)),
    )


def test_the_caller_chooses_the_grad_mode() -> None:
    executor = Executor(fxquant.trace(opt()).requires_grad_(True))
    assert executor.run(input_ids=token_ids(1, 3)).requires_grad
    with torch.no_grad():
        assert not executor.run(input_ids=token_ids(1, 3)).requires_grad
