"""What each node computes, with symbolic batch B and length L, without running anything.

The graph is interpreted twice on fake tensors, with two pairs (batch, length). A size that is the
same in both is a constant; one that changed is a multiple of B, L or B*L, or one of them plus a
constant. Batches and lengths are primes, so that a size has one reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from fxquant.ir.graph import device_of, info
from fxquant.ir.legal_forms import observer_nodes
from fxquant.ir.size import short_dtype
from fxquant.run.execution import Executor

_BATCHES = (5, 7)
_LENGTHS = (11, 13)


@dataclass(frozen=True)
class Value:
    """What a node computes.

    ``shape`` such as ``[B, L, 2048]`` and ``dtype`` such as ``int8``; for what is no tensor (a
    size, a dtype, a device) ``scalar`` is its text, ``L`` say, and the others are empty.
    """

    shape: str = ""
    dtype: str = ""
    scalar: str | None = None


UNKNOWN = Value()


def propagate(gm: GraphModule) -> dict[str, Value]:
    """The Value of each node by name; sizes that follow no rule read ``?``."""
    limit = info(gm).max_positions or _LENGTHS[1]
    lengths = (max(1, min(_LENGTHS[0], limit - 2)), min(_LENGTHS[1], limit))
    first, second = (
        _fake_run(gm, batch, length) for batch, length in zip(_BATCHES, lengths, strict=True)
    )
    sizes = _Sizes(_BATCHES, lengths)
    return {name: _value(first[name], second[name], sizes) for name in first}


def _fake_run(gm: GraphModule, batch: int, length: int) -> dict[str, Any]:
    values: dict[str, Any] = {}

    def keep(node: Node, value: Any) -> Any:
        values[node.name] = value
        return value

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ids = torch.zeros(batch, length, dtype=torch.int64, device=device_of(gm))
        mask = torch.ones_like(ids)
        Executor(gm, skip=observer_nodes(gm)).run(keep, input_ids=ids, attention_mask=mask)
    return values


@dataclass(frozen=True)
class _Sizes:
    """The two probes, and how a pair of sizes reads."""

    batches: tuple[int, int]
    lengths: tuple[int, int]

    def text(self, a: int, b: int) -> str:
        if a == b:
            return str(a)
        both = (self.batches[0] * self.lengths[0], self.batches[1] * self.lengths[1])
        symbols = (("L", self.lengths), ("B", self.batches), ("B*L", both))
        for symbol, (x, y) in symbols:
            factor = a // x
            if (factor * x, factor * y) == (a, b):
                return symbol if factor == 1 else f"{factor}*{symbol}"
        for symbol, (x, y) in symbols:
            if a - x == b - y:
                return f"{symbol}{a - x:+d}"
        return "?"


def _value(a: Any, b: Any, sizes: _Sizes) -> Value:
    if a is None:
        return UNKNOWN
    if isinstance(a, Tensor):
        return Value(_shape(a.shape, b.shape, sizes), short_dtype(a.dtype))
    if isinstance(a, tuple) and any(isinstance(part, Tensor) for part in a):
        parts = [_value(x, y, sizes) for x, y in zip(a, b, strict=True)]
        if len(parts) == 2 and parts[0].dtype != "int8":
            return Value(f"{parts[0].shape}, {parts[1].shape}", "pair")
        if len(set(parts)) > 1:
            return Value(f"{parts[0].shape} etc.", parts[0].dtype)
        return Value(f"{len(parts)} x {parts[0].shape}", "tuple")
    return Value(scalar=_scalar(a, b, sizes))


def _shape(a: torch.Size, b: torch.Size, sizes: _Sizes) -> str:
    return f"[{', '.join(sizes.text(x, y) for x, y in zip(a, b, strict=True))}]"


def _scalar(a: Any, b: Any, sizes: _Sizes) -> str:
    if isinstance(a, bool):
        return str(a)
    if isinstance(a, torch.Size):
        return _shape(a, b, sizes)
    if isinstance(a, int):
        return sizes.text(a, b)
    if isinstance(a, float):
        return f"{a:.6g}"
    if isinstance(a, torch.dtype):
        return short_dtype(a)
    return type(a).__name__ if isinstance(a, torch.finfo) else str(a)
