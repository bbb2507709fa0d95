"""What fakes let pass and a run does not: seen to before any code is generated."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

from fxquant.checkpoint.fake_calls import run_call

SQUARE, BATCH = "square", "batch"  # [4, 4] and [2, 4, 4], in the first dtype
OTHER = {SQUARE: "half square", BATCH: "half batch"}
CALLS: dict[str, tuple[str, Any, tuple[str, ...], dict[str, Any]]] = {
    "linear": ("call_function", nn.functional.linear, (SQUARE, OTHER[SQUARE]), {}),
    "linear by name": ("call_function", nn.functional.linear, (SQUARE,), {"weight": OTHER[SQUARE]}),
    "bias": ("call_function", nn.functional.linear, (SQUARE, SQUARE, "half row"), {}),
    "bias by name": ("call_function", nn.functional.linear, (SQUARE, SQUARE), {"bias": "half row"}),
    "matmul": ("call_function", torch.matmul, (BATCH, OTHER[BATCH]), {}),
    "@": ("call_function", operator.matmul, (SQUARE, OTHER[SQUARE]), {}),
    "x.matmul": ("call_method", "matmul", (SQUARE, OTHER[SQUARE]), {}),
    "mm": ("call_function", torch.mm, (SQUARE, OTHER[SQUARE]), {}),
    "x.mm": ("call_method", "mm", (SQUARE, OTHER[SQUARE]), {}),
    "x.mm by name": ("call_method", "mm", (SQUARE,), {"mat2": OTHER[SQUARE]}),
    "bmm": ("call_function", torch.bmm, (BATCH, OTHER[BATCH]), {}),
    "x.bmm": ("call_method", "bmm", (BATCH, OTHER[BATCH]), {}),
    "baddbmm": ("call_function", torch.baddbmm, (BATCH, BATCH, OTHER[BATCH]), {}),
    "x.baddbmm": ("call_method", "baddbmm", (BATCH, BATCH), {"batch2": OTHER[BATCH]}),
}


def run(name: str, mixed: bool) -> Any:
    op, target, args, kwargs = CALLS[name]
    node = Graph().create_node(op, target)
    with FakeTensorMode():
        other = torch.float16 if mixed else torch.float32
        values = {
            **{SQUARE: torch.randn(4, 4), BATCH: torch.randn(2, 4, 4)},
            **{OTHER[SQUARE]: torch.randn(4, 4, dtype=other)},
            **{OTHER[BATCH]: torch.randn(2, 4, 4, dtype=other)},
            "half row": torch.randn(4, dtype=other),
        }
        given = {key: values[value] for key, value in kwargs.items()}
        return run_call(node, tuple(values[each] for each in args), given, {}, {})


@pytest.mark.parametrize("name", CALLS)
def test_products_of_two_dtypes_are_refused_however_they_are_called(name: str) -> None:
    assert run(name, mixed=False).dtype == torch.float32
    with pytest.raises(TypeError, match=r"operands of torch\.float16 and torch\.float32"):
        run(name, mixed=True)


@pytest.mark.parametrize(
    ("op", "target"), [("call_function", torch.split), ("call_method", "split")]
)
def test_pieces_are_counted_however_they_are_cut(op: str, target: Any) -> None:
    node = Graph().create_node(op, target)
    with FakeTensorMode():
        x = torch.randn(10**5)
        assert len(run_call(node, (x, 10**4), {}, {}, {})) == 10
        with pytest.raises(OverflowError, match="100000 pieces"):
            run_call(node, (x, 1), {}, {}, {})
