"""A graph that is taken for the model says what it is, and is a GraphModule in all else."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import fxquant
from fxquant.errors import (
    CheckpointError,
    FxquantError,
    GraphAttributeError,
    GraphCallError,
    GraphError,
)
from fxquant.frontends.scoring import ScoringGraph
from fxquant.ir.graph import clone_sharing_storage
from tests.architectures import opt, padding_mask, token_ids

IDS, MASK = token_ids(2, 9), padding_mask(2, 9, "left")


@functools.cache
def graph() -> GraphModule:
    return fxquant.convert(opt(), "w8a8-dynamic-token")


ASKED = (
    *("generate", "config", "generation_config", "device", "dtype", "logits", "past_key_values"),
    *("get_input_embeddings", "save_pretrained", "resize_token_embeddings", "name_or_path"),
)


@pytest.mark.parametrize("name", ASKED)
def test_what_a_model_has_and_a_graph_has_not(name: str) -> None:
    assert not hasattr(graph(), name)
    assert getattr(graph(), name, "default") == "default"
    with pytest.raises(GraphAttributeError, match=rf"no attribute '{name}'.*returns the logits"):
        getattr(graph(), name)
    assert issubclass(GraphAttributeError, AttributeError)


@pytest.mark.parametrize("name", ["nonsense", "_hf_hook", "__len__"])
def test_other_names_are_missing_as_everywhere(name: str) -> None:
    with pytest.raises(AttributeError, match="object has no attribute") as raised:
        getattr(graph(), name)
    assert not isinstance(raised.value, FxquantError)


CALLS: dict[str, tuple[Callable[[Any], object], str]] = {
    "labels": (lambda g: g(IDS, labels=IDS), "no input 'labels'.*cross_entropy"),
    "past": (lambda g: g(IDS, past_key_values=None), "no input 'past_key_values'.*no cache"),
    "cache": (lambda g: g(input_ids=IDS, use_cache=False), "no input 'use_cache'.*leave it out"),
    "dict": (lambda g: g(input_ids=IDS, return_dict=True), "no input 'return_dict'.*the logits"),
    "unknown": (lambda g: g(IDS, foo=1), "no input 'foo'"),
    "a batch": (lambda g: g({"input_ids": IDS}), "a dict as input_ids.*attention_mask=mask"),
    "a list": (lambda g: g([[1, 2]]), "a list as input_ids"),
    "text": (lambda g: g("once upon a time"), "a str as input_ids"),
    "nothing": (lambda g: g(), "input_ids is needed"),
    "a mask": (lambda g: g(attention_mask=MASK), "input_ids is needed"),
    "twice": (lambda g: g(IDS, input_ids=IDS), "each input once"),
    "too many": (lambda g: g(IDS, MASK, IDS), "each input once"),
}


@pytest.mark.parametrize("what", CALLS)
def test_what_a_graph_does_not_take(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    call, message = CALLS[what]
    with pytest.raises(GraphCallError, match=message):
        call(graph())
    assert issubclass(GraphCallError, TypeError)
    assert capsys.readouterr().err == ""  # torch.fx prints of errors in generated code


LEAF, NORM = "model.decoder.layers.0.fc1", "model.decoder.final_layer_norm"
DOORS: dict[str, Callable[[GraphModule], object]] = {
    "call": lambda g: g(IDS, MASK),
    "evaluate": lambda g: fxquant.evaluate(g, IDS),
    "explain": lambda g: fxquant.explain(g, "w8", data=IDS, methods=("alone",), worst=0),
    "convert": lambda g: fxquant.convert(g, "w8"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("path", [LEAF, NORM, "lm_head"])
def test_a_leaf_that_was_moved_or_cast_by_itself(path: str, door: str) -> None:
    """Also where torch would compute with what memory holds: a linear of a weight on meta."""
    moved = fxquant.trace(opt())
    moved.get_submodule(path).to("meta")
    with pytest.raises(GraphError, match=r"\.weight of the graph is on device meta"):
        DOORS[door](moved)
    for dtype in (torch.float16, torch.float64):
        cast = fxquant.trace(opt())
        cast.get_submodule(path).to(dtype)
        with pytest.raises(
            GraphCallError,
            match=rf"{path}\.(weight|bias) .*of (float16|float64|float32).*as a whole",
        ):
            DOORS[door](cast)


def test_a_quantized_graph_that_was_moved_or_cast_in_part() -> None:
    for path in (LEAF, "model.decoder.embed_tokens"):
        moved = fxquant.convert(opt(), "w8a8-dynamic-token")
        moved.get_submodule(path).to("meta")
        for door in ("call", "evaluate"):
            with pytest.raises(GraphError, match="on device meta"):
                DOORS[door](moved)
    with pytest.raises(GraphError, match="on device meta"):
        str(fxquant.inspect(fxquant.convert(opt(), "w8").to("meta")))
    cast = fxquant.convert(opt(), "w8a8-dynamic-token")
    cast.get_submodule(NORM).double()
    for door in ("call", "evaluate"):
        with pytest.raises(GraphCallError, match=rf"{NORM}\.weight.*float64"):
            DOORS[door](cast)


def test_a_graph_as_a_whole_may_be_moved_and_cast() -> None:
    assert graph()(IDS, MASK).dtype == torch.float32
    shapes = fxquant.trace(opt()).to("meta")(IDS.to("meta"), MASK.to("meta"))
    assert shapes.is_meta
    assert shapes.shape == (*IDS.shape, shapes.shape[-1])
    for dtype in (torch.float64, torch.bfloat16):
        assert copy.deepcopy(graph()).to(dtype)(IDS, MASK).dtype == dtype


def test_errors_of_other_causes_stay_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    cast = fxquant.trace(opt())
    monkeypatch.setattr(
        type(cast.get_submodule(LEAF)), "forward", lambda *_: torch.ones(2) + torch.ones(3)
    )
    for door in ("call", "evaluate"):
        with pytest.raises(RuntimeError, match="size of tensor") as raised:
            DOORS[door](cast)
        assert not isinstance(raised.value, FxquantError)


def test_the_docs_answer_where_the_errors_send() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    section = readme.partition("\n## What it does not do\n")[2].partition("\n## ")[0]
    assert "[batch, length, vocab]" in section
    assert "does not generate" in section


def test_copies_and_checkpoints_keep_the_class(tmp_path: Path) -> None:
    expected = graph()(IDS, MASK)
    fxquant.save(graph(), tmp_path / "saved")
    copies = {
        "copy": copy.copy(graph()),
        "deepcopy": copy.deepcopy(graph()),
        "clone": clone_sharing_storage(graph()),
        "load": fxquant.load(tmp_path / "saved"),
    }
    for name, each in copies.items():
        assert isinstance(each, ScoringGraph), name
        assert torch.equal(each(IDS, MASK), expected), name
        with pytest.raises(GraphAttributeError):
            each.generate  # noqa: B018
    half = copy.deepcopy(graph()).half()
    assert isinstance(half, ScoringGraph)
    assert half(IDS).dtype == torch.float16
    assert isinstance(fxquant.trace(opt()), ScoringGraph)


PICKLERS: dict[str, Callable[[Any], object]] = {
    "pickle": pickle.dumps,
    "old protocol": lambda graph: pickle.dumps(graph, protocol=1),
    "torch.save": lambda graph: torch.save(graph, io.BytesIO()),
    "in a dict": lambda graph: pickle.dumps({"graph": graph}),
    "a copy": lambda graph: pickle.dumps(copy.copy(graph)),
    "a float graph": lambda _: pickle.dumps(fxquant.trace(opt())),
}


@pytest.mark.parametrize("how", PICKLERS)
def test_a_pickle_is_refused_when_it_is_written(how: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"cannot be pickled.* fxquant\.save\(graph, folder\)"
    ):
        PICKLERS[how](graph())


def test_a_state_dict_can_be_pickled() -> None:
    kept = io.BytesIO()
    torch.save(graph().state_dict(), kept)
    kept.seek(0)
    again = copy.deepcopy(graph())
    again.load_state_dict(torch.load(kept), assign=True)
    assert torch.equal(again(IDS, MASK), graph()(IDS, MASK))


def test_export_and_compile_see_a_graph_module() -> None:
    expected = graph()(IDS, MASK)
    exported = torch.export.export(graph(), (IDS, MASK))
    assert torch.equal(exported.module()(IDS, MASK), expected)
    compiled = torch.compile(graph(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(input_ids=IDS, attention_mask=MASK), expected)


def test_the_forward_looks_modules_up_no_longer_than_torch_does() -> None:
    """Names of modules are found without a call of nn.Module's own look-up."""
    found = graph()
    assert type(found).__getattr__ is ScoringGraph.__getattr__
    assert found.model is found._modules["model"]


def test_a_state_of_another_scheme_is_not_cast_to_codes() -> None:
    """torch copies whatever has the same name and shape."""
    model = opt()
    schemes = ("w8a8-dynamic-token", "fp8", "w8a8-dynamic", "fp")
    graphs = {scheme: fxquant.convert(model, scheme) for scheme in schemes}
    kept = {name: value.clone() for name, value in graphs["fp8"].state_dict().items()}
    for scheme in ("w8a8-dynamic-token", "fp"):
        state = graphs[scheme].state_dict()
        for options in ({}, {"strict": False}, {"strict": False, "assign": True}):
            with pytest.raises(GraphError, match=r"weight is of torch\.\w+ there and of torch\.fl"):
                graphs["fp8"].load_state_dict(state, **options)
    with pytest.raises(GraphError, match="the float model"):
        graphs["w8a8-dynamic"].load_state_dict(model.state_dict(), strict=False)
    assert all(torch.equal(value, kept[n]) for n, value in graphs["fp8"].state_dict().items())
    other = fxquant.convert(opt(seed=3), "w8a8-dynamic")
    graphs["w8a8-dynamic"].load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(graphs["w8a8-dynamic"](IDS, MASK), other(IDS, MASK))
    graphs["fp"].half().load_state_dict(opt(seed=3).state_dict(), strict=False)
