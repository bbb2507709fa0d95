"""Architectures beside those of test_tracing: traced, converted, compared with the plain swap."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import fxquant
from fxquant.ir.graph import info
from fxquant.passes import NameSites
from tests.architectures import ARCHITECTURES, padding_mask, token_ids
from tests.environments import needs_hf_tracer
from tests.more_architectures import MIXTURES, MORE
from tests.plain_mixtures import plain
from tests.test_reference import batches, check_against_the_swap
from tests.test_tracing import EXACT, difference

EVERY = {**ARCHITECTURES, **MORE}
# What differs most from the others; all the rest is slow.
SHORT = ("falcon-new", "falcon-alibi", "cohere2", "olmo", "nemotron", "mpt", "lfm2", "gpt-oss")
# What transformers' tracer computes otherwise, or gives up on: written into a tensor, chosen by
# Python on a Proxy.
NOT_HF = ("falcon-alibi", "olmo", "nemotron", "xglm", "mpt")
SCHEMES = ("w8a8-dynamic-token", "w8a8-static:absmax", "w4-g12/a8-dynamic-token", "w8a8-dynamic")
SHAPES = (
    *((1, 1, "none"), (1, 7, "none"), (3, 1, "none"), (1, 16, "left")),
    *((3, 13, "right"), (4, 21, "both"), (2, 40, "left")),
)


def slow_but(names: tuple[str, ...], every: object = MORE) -> list[object]:
    assert set(names) <= set(EVERY)
    marks = {name: () if name in names else (pytest.mark.slow,) for name in every}  # type: ignore[attr-defined]
    return [pytest.param(name, marks=mark, id=name) for name, mark in marks.items()]


@functools.cache
def traced(name: str) -> tuple[PreTrainedModel, GraphModule]:
    """Shared by tests that change neither."""
    model = EVERY[name]()
    return model, fxquant.trace(model)


@pytest.mark.parametrize("name", slow_but(SHORT))
def test_equal_at_unseen_shapes_and_paddings(name: str) -> None:
    model, graph = traced(name)
    worst = max(
        difference(model, graph, token_ids(batch, length), padding_mask(batch, length, padding))
        for batch, length, padding in SHAPES
    )
    assert worst <= EXACT[torch.float32]


@pytest.mark.parametrize("name", slow_but(SHORT))
def test_every_matrix_of_the_blocks_is_a_site_or_named(name: str) -> None:
    model, graph = traced(name)
    facts = info(NameSites()(graph))
    paths = {site.path for site in facts.sites}
    blocks = next(m for m in plain(model).modules() if isinstance(m, nn.ModuleList))
    linears = [m for m in blocks.modules() if isinstance(m, nn.Linear | Conv1D)]
    inside = [site for site in facts.sites if site.role == "linear"]
    assert len(inside) == len(linears)
    assert all(path.startswith(facts.blocks) for path in (site.path for site in inside))
    named = paths | {entry.path for entry in facts.left_in_float}
    assert {facts.head, facts.embeddings} <= named


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", slow_but((), EVERY))
def test_agrees_with_the_module_swap(name: str, scheme: str) -> None:
    model, graph = traced(name)
    check_against_the_swap(model, graph, scheme, plain(model))


@pytest.mark.parametrize("name", ["falcon-multi-query", "gpt-oss", "mixtral"])
def test_agrees_with_the_module_swap_in_short(name: str) -> None:
    model, graph = traced(name)
    check_against_the_swap(model, graph, "w8a8-static:absmax", plain(model))


@needs_hf_tracer
@torch.no_grad()
@pytest.mark.parametrize("name", slow_but(("opt", "llama", "gemma2-eager", "mixtral"), EVERY))
def test_the_front_ends_agree_bit_for_bit(name: str) -> None:
    if name in NOT_HF:
        with pytest.raises(fxquant.FxquantError):
            fxquant.trace(EVERY[name](), frontend="hf")
        return
    model = EVERY[name]()
    graphs = [fxquant.trace(model, frontend=frontend) for frontend in ("hf", "recorder")]
    for scheme in (
        *("w8", "w8a8-dynamic-token", "w8a8-static"),
        "w8a8-static:absmax+smooth(where=all)",
    ):
        hf, ours = (fxquant.convert(g, scheme, calibration=batches(3, seed=7)) for g in graphs)
        for batch, length, padding in ((3, 17, "left"), (1, 5, "none")):
            inputs = token_ids(batch, length, 3), padding_mask(batch, length, padding)
            assert torch.equal(hf(*inputs), ours(*inputs)), scheme


# Mixtures


@pytest.mark.parametrize("name", ["olmoe", "gpt-oss"])
def test_the_printout_says_that_all_experts_run(name: str) -> None:
    model, graph = traced(name)
    text = " ".join(str(fxquant.inspect(fxquant.convert(graph, "w8"))).split())
    assert "all 4 experts compute every token, and the routing weighs the results" in text
    views = any(parameter.dim() == 3 for parameter in model.parameters())
    assert ("their paths here are fxquant's" in text) == views


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_share_the_models_storage(name: str) -> None:
    model, graph = traced(name)
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {p.untyped_storage().data_ptr() for p in graph.parameters()} <= theirs
    paths = {site.path for site in info(NameSites()(graph)).sites}
    wanted = {
        path
        for path, module in plain(model).named_modules()
        if ".experts." in path and isinstance(module, nn.Linear)
    }
    assert wanted
    assert {path for path in paths if ".experts." in path} == wanted
