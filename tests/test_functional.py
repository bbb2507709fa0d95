"""Writes into tensors of a traced graph become new tensors where nothing else would see them."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import symbolic_trace

import fxquant
from benchmarks.architectures_table import save_and_load
from fxquant.frontends.functional import make_functional
from tests.test_more_architectures import EVERY


@torch.fx.wrap
def overwrite(x: Tensor, index: object, value: Tensor) -> None:
    """What a Proxy does not take; setitem in the graphs."""
    x[index] = value  # type: ignore[index]


def scattered(x: Tensor) -> Tensor:
    return torch.zeros_like(x).scatter_(-1, x.argsort(-1), x)


def scattered_into_a_view(x: Tensor) -> Tensor:
    return torch.zeros_like(x).unsqueeze(0).scatter_(-1, x.argsort(-1)[None], x[None])


def scattered_into_what_is_read(x: Tensor) -> Tensor:
    zeros = torch.zeros_like(x)
    return zeros.scatter_(-1, x.argsort(-1), x) + zeros


def scattered_into_the_input(x: Tensor) -> Tensor:
    return x.view(-1).masked_fill_(x.view(-1) > 0, 3.0)


def added_to(x: Tensor) -> Tensor:
    y = x.cumsum(0).unsqueeze(0)
    overwrite(y, ..., y + 2)
    return y.view(-1) * 3


def added_behind_a_view(x: Tensor) -> Tensor:
    y = x.cumsum(0).unsqueeze(0)
    before = y.view(-1)
    overwrite(y, ..., y + 2)
    return before + y.view(-1)


def product_of_bool(x: Tensor) -> Tensor:
    """Which stays bool where it is written into one."""
    y = (x > 0).clone()
    overwrite(y, ..., y * 2)
    return y


def sum_in_another_dtype(x: Tensor) -> Tensor:
    y = x.clone()
    overwrite(y, ..., y + x.double())
    return y


@pytest.mark.parametrize(
    ("function", "writes"),
    [
        (scattered, 0),
        (scattered_into_a_view, 0),
        (scattered_into_what_is_read, 1),
        (scattered_into_the_input, 1),
        (added_to, 0),
        (added_behind_a_view, 1),
        (product_of_bool, 1),
        (sum_in_another_dtype, 1),
    ],
)
def test_what_is_computed_stays(function: Callable[[Tensor], Tensor], writes: int) -> None:
    graph = symbolic_trace(function)
    for node in graph.graph.nodes:
        if node.target is overwrite:
            node.target = operator.setitem
    make_functional(graph.graph)
    graph.graph.lint()
    graph.recompile()
    names = [getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes]
    assert (
        sum(name == "setitem" or name.endswith("l_") or name == "scatter_" for name in names)
        == writes
    )
    x = torch.randn(7, generator=torch.Generator().manual_seed(0))
    found, wanted = graph(x.clone()), function(x.clone())
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("name", ["xglm", "gpt-oss"])
def test_models_that_wrote_into_tensors_are_saved(name: str) -> None:
    save_and_load(fxquant.trace(EVERY[name]()))
