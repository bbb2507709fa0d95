"""A recording that is shared is the one that the model would have had."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from tests.architectures import ARCHITECTURES, llama, opt, padding_mask, token_ids
from tests.environments import TRANSFORMERS_5
from tests.recorded import RECORDED_ANEW, RecordedOnce, Unknown, shared, structure

IDS, MASK = token_ids(3, 11), padding_mask(3, 11, "both")


# Under 4.57 the rotary tables of others are tensors that are no buffers, which are not shared.
NAMES = ("opt", "gpt2-eager", "bloom", *(("llama", "gemma2-eager") if TRANSFORMERS_5 else ()))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_the_same_structure_has_the_same_graph(name: str) -> None:
    first, second = ARCHITECTURES[name](), ARCHITECTURES[name]()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.25)  # other weights
    recorded = RecordedOnce()
    with shared(recorded):
        fxquant.trace(first, "recorder")
        found = fxquant.trace(second, "recorder")
    assert len(recorded._known) == 1
    anew = fxquant.trace(second, "recorder")
    assert [str(node) for node in found.graph.nodes] == [str(node) for node in anew.graph.nodes]
    assert found.code == anew.code
    assert [node.meta.keys() for node in found.graph.nodes] == [
        node.meta.keys() for node in anew.graph.nodes
    ]
    assert torch.equal(found(IDS, MASK), anew(IDS, MASK))


def scaled(model: Any) -> Any:
    model.model.decoder.layers[1].self_attn.scaling *= 2
    return model


def activated(model: Any) -> Any:
    model.model.decoder.layers[0].activation_fn = nn.GELU()
    return model


def untied(model: Any) -> Any:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    return model


def hooked(model: Any) -> Any:
    model.model.decoder.layers[0].register_forward_pre_hook(lambda module, args: None)
    return model


def patched(model: Any) -> Any:
    model.lm_head.forward = lambda x: nn.functional.linear(x, model.lm_head.weight)
    return model


@pytest.mark.parametrize(
    "other",
    [
        *(scaled, activated, untied, hooked, patched),
        *(lambda model: model.half(), lambda model: model.train(), lambda model: model.to("meta")),
        lambda _: opt(num_hidden_layers=3),
        lambda _: opt(layerdrop=0.25),  # in the config alone
        lambda _: llama(),
    ],
)
def test_whatever_differs_but_for_numbers_in_tensors_is_another_structure(
    other: Callable[[Any], Any],
) -> None:
    with contextlib.suppress(Unknown):  # then it is recorded, whatever was before
        assert structure(other(opt())) != structure(opt())
    assert structure(opt(seed=1)) == structure(opt())


def test_the_attention_that_is_registered_is_part_of_it() -> None:
    """Eager and sdpa models hold nothing else that tells them apart while they are recorded."""
    recorded = RecordedOnce()
    with shared(recorded):
        for attention in ("sdpa", "eager", "eager"):
            fxquant.trace(opt(attention=attention, num_hidden_layers=1), "recorder")
    assert len(recorded._known) == 2


def test_files_that_share_nothing_are_there(request: pytest.FixtureRequest) -> None:
    names = {path.name for path in request.path.parent.rglob("test_*.py")}
    assert not {*RECORDED_ANEW} - names
