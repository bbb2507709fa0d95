"""A graph called as a model is: inputs that are none are one error, before anything is computed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

import fxquant
from fxquant.errors import GraphCallError
from tests.architectures import VOCABULARY, llama, opt, token_ids
from tests.hub_format import character_tokenizer
from tests.test_cuda_fake import fake_cuda

pandas = importlib.import_module("pandas")  # without stubs
IDS = token_ids(2, 8)
ROW = IDS[0]


@functools.cache
def graphs() -> tuple[GraphModule, ...]:
    return (
        fxquant.trace(opt()),
        fxquant.convert(llama(), "w8a8-dynamic"),
        fxquant.convert(llama(), "w8a8-static", calibration=[token_ids(2, 9)], level="kernels"),
    )


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)


NO_IDS: dict[str, tuple[Callable[[], Any], str]] = {
    "an array": (IDS.numpy, "a ndarray as input_ids.*return_tensors"),
    "a table": (lambda: pandas.DataFrame(IDS.numpy()), "a DataFrame as input_ids"),
    "a column": (lambda: pandas.Series(ROW.numpy()), "a Series as input_ids"),
    "a number": (lambda: 3, "a int as input_ids"),
    "numpy's number": (lambda: np.int64(3), "a int64 as input_ids"),
    "nothing": (lambda: None, "a NoneType as input_ids"),
    "a generator": (lambda: iter(IDS), "as input_ids"),
    "what the tokenizer holds inside": (
        lambda: character_tokenizer()("a word").encodings[0],
        "a Encoding as input_ids",
    ),
    "what the tokenizer returns": (
        lambda: character_tokenizer()("a word", return_tensors="pt"),
        r"a BatchEncoding as input_ids.*graph\(\*\*that\)",
    ),
    "no axis": (lambda: torch.tensor(5), r"must be \[batch, length\] and hold a token, got \[\]"),
    "one axis": (lambda: ROW, r"got \[8\]; ids\[None\] is a batch of one row"),
    "three axes": (lambda: IDS[None], r"got \[1, 2, 8\]"),
    "no rows": (lambda: IDS[:0], r"got \[0, 8\]"),
    "no tokens": (lambda: IDS[:, :0], r"got \[2, 0\]"),
    "neither": (lambda: IDS[:0, :0], r"got \[0, 0\]"),
    "fractions": (IDS.float, "must be integers, got torch.float32"),
    "halves": (IDS.half, "must be integers, got torch.float16"),
    "truths": (lambda: IDS > 9, "must be integers, got torch.bool"),
    "complex": (lambda: IDS.to(torch.complex64), "must be integers, got torch.complex64"),
    "sparse": (IDS.to_sparse, "input_ids must be a dense tensor"),
    "nested": (lambda: torch.nested.nested_tensor([ROW, ROW[:3]]), "must be a dense tensor"),
    "below 0": (lambda: -IDS, rf"ids -\d+ to -\d+ in rows of 8 tokens.* 0 to {VOCABULARY - 1}"),
    "beyond": (lambda: IDS + VOCABULARY, f"graph takes 0 to {VOCABULARY - 1}"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("kind", NO_IDS)
def test_ids_that_are_none(kind: str) -> None:
    make, message = NO_IDS[kind]
    for graph in graphs():
        for inputs in ({}, {"input_ids": make()}):
            with pytest.raises(GraphCallError, match=message) as caught:
                graph(**inputs) if inputs else graph(make())
            assert len(str(caught.value)) < 600


NO_MASK: dict[str, tuple[Callable[[], Any], str]] = {
    "shorter": (lambda: ones(2, 5), r"\[2, 5\] does not fit input_ids \[2, 8\]"),
    "one row": (lambda: ones(1, 8), r"\[1, 8\] does not fit"),
    "flat": (lambda: ones(8), r"\[8\] does not fit"),
    "additive": (lambda: torch.zeros(2, 1, 8, 8), r"\[2, 1, 8, 8\] does not fit"),
    "ids": (lambda: IDS + 5, r"must be 0 \(padding\) and 1, found \d+ .*token ids\?"),
    "two": (lambda: 2 * ones(2, 8), "found 2 at 16 of 16"),
    "minus one": (lambda: -ones(2, 8), "found -1"),
    "nan": (lambda: torch.full((2, 8), torch.nan), "found nan"),
    "lowest": (lambda: torch.full((2, 8), torch.finfo(torch.float32).min), "found -3.4"),
    "fractions": (lambda: torch.full((2, 8), 0.5), "found 0.5"),
    "an array": (ones(2, 8).numpy, "a ndarray as attention_mask"),
    "a number": (lambda: 1, "a int as attention_mask"),
    "a truth value": (lambda: True, "a bool as attention_mask"),
    "text": (lambda: "causal", "a str as attention_mask"),
    "lists": (lambda: [[1] * 8] * 2, "a list as attention_mask"),
    "complex": (lambda: ones(2, 8).to(torch.complex64), "must be a dense tensor of 0 and 1"),
    "sparse": (ones(2, 8).to_sparse, "attention_mask must be a dense tensor"),
}


@pytest.mark.parametrize("kind", NO_MASK)
def test_masks_that_are_none(kind: str) -> None:
    make, message = NO_MASK[kind]
    for graph in graphs():
        with pytest.raises(GraphCallError, match=message):
            graph(IDS, make())
        with pytest.raises(GraphCallError, match=message):
            graph(input_ids=IDS, attention_mask=make())


DTYPES = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids_of_any_integer_dtype_are_the_same(dtype: torch.dtype) -> None:
    for graph in graphs():
        assert torch.equal(graph(IDS.to(dtype)), graph(IDS))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_masks_of_any_dtype_are_the_same(dtype: torch.dtype) -> None:
    mask = (torch.arange(8) >= torch.tensor([[3], [0]])).to(torch.int64)
    for graph in graphs():
        assert torch.equal(graph(IDS, mask.to(dtype)), graph(IDS, mask))
        assert torch.equal(graph(IDS, None), graph(IDS))


def test_whatever_a_tokenizer_returns_beside_the_ids_is_let_go() -> None:
    """An overflowing text is several rows, and says of which text each is."""
    tokenizer = character_tokenizer(bos=False)
    cut: dict[str, Any] = {"max_length": 4, "truncation": True, "return_overflowing_tokens": True}
    found = tokenizer(
        "abcdefgh",
        return_tensors="pt",
        return_special_tokens_mask=True,
        return_offsets_mapping=True,
        return_length=True,
        **cut,
    )
    assert len(found) > 4
    for graph in graphs():
        assert torch.equal(graph(**found), graph(found["input_ids"], found["attention_mask"]))
    with pytest.raises(GraphCallError, match="no input 'labels'"):
        graphs()[0](**found, labels=found["input_ids"])


def test_an_input_on_another_device_than_the_graph_s() -> None:
    mode = FakeTensorMode()
    fake = fake_cuda(graphs()[0], mode)
    with mode, pytest.raises(GraphCallError, match=r"input_ids is on cpu, the graph on cuda.*to\("):
        fake(torch.ones(2, 8, dtype=torch.int64))


def test_a_graph_inside_of_torch_s_transforms() -> None:
    """None of which tells the values of a mask."""
    graph, mask = graphs()[0], ones(2, 8)
    expected = graph(IDS, mask)
    mapped = torch.vmap(graph)(IDS[:, None], mask[:, None])
    torch.testing.assert_close(mapped[:, 0], expected)
    parameters: dict[str, Tensor] = dict(graph.named_parameters())
    assert torch.equal(torch.func.functional_call(graph, parameters, (IDS, mask)), expected)

    class Within(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = graph

        def forward(self, ids: Tensor) -> object:
            return self.inner(ids)

    assert torch.equal(torch.fx.symbolic_trace(Within())(IDS), graph(IDS))
