"""The graph as it grows: nodes for calls, operands for what calls are given."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, nn
from torch.fx import Graph, Node

from fxquant.errors import TracingError
from fxquant.frontends.recorder.shadow import Shadow
from fxquant.frontends.recorder.sizes import Sizes
from fxquant.frontends.recorder.spelling import Call
from fxquant.frontends.recorder.values import Values
from fxquant.ir.graph import Tag, set_tag


class NoDtypeYet(TracingError):
    """The model's dtype is asked for before any value has it."""


class Recording:
    """A graph of (input_ids, attention_mask) and what is known of its values.

    ``places``: paths of the modules that are running, the outermost first. ``paused``: whether a
    leaf runs, inside which nothing is recorded. ``stop``: set where the recording is given up.

    No device stands in the graph: a device becomes ``input_ids.device``. Nor does the model's own
    dtype, where the shadow has a marker for it: it becomes the dtype of the first value that has
    it, and so does the lowest number of that dtype, which masks are filled with.
    """

    def __init__(self, shadow: Shadow, original: nn.Module, stop: threading.Event) -> None:
        self.graph = Graph()
        self.stop = stop
        self.places: list[str] = []
        self.paused = False
        self._marker = shadow.marker
        self._anchor: Node | None = None
        self._derived: dict[str, Node] = {}
        self.values = Values(self.add, shadow.model, original)
        ids, mask = (self.graph.placeholder(name) for name in ("input_ids", "attention_mask"))
        for node, value in ((ids, shadow.input_ids), (mask, shadow.attention_mask)):
            set_tag(node, Tag())
            self.values.bind(value, node)
        self._inputs, self._ids = (ids, mask), ids
        self.sizes = Sizes(self.add, shadow.input_ids, ids)

    def add(self, op: str, target: Any, args: Any = (), kwargs: Any = None) -> Node:
        """A node at the end of the graph whose operands are nodes and plain values."""
        node = self.graph.create_node(op, target, args, kwargs or {})
        set_tag(node, Tag(scope=self.places[-1] if self.places else ""))
        return node

    def call(self, call: Call, value: Any) -> Node:
        """A node for ``call``, which gave ``value``."""
        node = self.add(call.op, call.target, self.operand(call.args), self.operand(call.kwargs))
        self.values.bind(value, node)
        if self._anchor is None and isinstance(value, Tensor) and value.dtype is self._marker:
            self._anchor = node
        return node

    def output(self, logits: object) -> None:
        if not isinstance(logits, Tensor):
            raise TracingError("its logits are no tensor")
        set_tag(self.graph.output(self.values.node_of(logits)), Tag())

    def operand(self, value: Any) -> Any:
        """``value`` as an argument of a node: tensors and sizes become nodes."""
        if isinstance(value, Tensor):
            return self.values.node_of(value)
        if isinstance(value, SymInt | SymFloat):
            return self.sizes.node_of(value)
        if isinstance(value, SymBool):
            return bool(value)
        if isinstance(value, tuple | list):
            items = [self.operand(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: self.operand(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self.operand(end) for end in (value.start, value.stop, value.step)))
        return self._constant(value)

    def _constant(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return self._once("device", lambda: self._behind(self._inputs[-1], self._ids, "device"))
        if self._marker is not None:
            if value is self._marker:
                return self._dtype()
            if type(value) is float and value == torch.finfo(self._marker).min:
                return self._once("lowest", self._lowest)
        return value

    def _dtype(self) -> Node:
        if self._anchor is None:
            raise NoDtypeYet("its dtype is asked for before any value has it")
        anchor = self._anchor
        return self._once("dtype", lambda: self._behind(anchor, anchor, "dtype"))

    def _lowest(self) -> Node:
        dtype = self._dtype()
        with self.graph.inserting_after(dtype):
            limits = self.add("call_function", torch.finfo, (dtype,))
        return self._behind(limits, limits, "min")

    def _behind(self, place: Node, source: Node, attribute: str) -> Node:
        with self.graph.inserting_after(place):
            return self.add("call_function", getattr, (source, attribute))

    def _once(self, what: str, make: Callable[[], Node]) -> Node:
        if what not in self._derived:
            self._derived[what] = make()
        return self._derived[what]
