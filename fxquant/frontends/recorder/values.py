"""Which node holds each tensor that a model under recording has made or owns."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from fxquant.errors import TracingError

Add = Callable[..., Node]


class Values:
    """Tensors by identity: every one that was seen stays alive, so no id is given twice.

    Args:
        add: makes a node of op, target and args.
        shadow: the model whose fake parameters and buffers become get_attr nodes.
        original: the model itself. A method that somebody replaced may still read its tensors.

    ``constants``: tensors that belong to no parameter or buffer, by the name of their get_attr.
    """

    def __init__(self, add: Add, shadow: nn.Module, original: nn.Module) -> None:
        self._add = add
        self._nodes: dict[int, Node | tuple[Node, int]] = {}
        self._alive: list[Tensor] = []
        self._sharing: dict[int, list[Tensor]] = {}
        self.constants: dict[str, Tensor] = {}
        self._paths: dict[int, str] = {}
        self._places: dict[object, str] = {}
        for path, tensor in _named(shadow):
            self._paths.setdefault(id(tensor), path)
        for path, tensor in _named(original):
            self._places.setdefault(_place(tensor), path)

    def bind(self, value: Any, node: Node) -> None:
        """``value``, or each tensor in the tuple that it is, is what ``node`` gives."""
        if isinstance(value, Tensor):
            self._keep(value, node)
        elif isinstance(value, tuple | list):
            for index, item in enumerate(value):
                if isinstance(item, Tensor):
                    self._keep(item, (node, index))
                elif isinstance(item, tuple | list):
                    self.bind(item, self._add("call_function", operator.getitem, (node, index)))

    def node_of(self, tensor: Tensor) -> Node:
        """The node that holds ``tensor``, made now where it is an item, a weight or a constant."""
        found = self._nodes.get(id(tensor))
        if isinstance(found, Node):
            return found
        if found is not None:
            node = self._add("call_function", operator.getitem, found)
        else:
            node = self._add("get_attr", self._path(tensor))
        self._keep(tensor, node)
        return node

    def owned(self, tensor: Tensor) -> str | None:
        """The path of ``tensor``, or of what it is a view of, where that is the model's own."""
        base = tensor if tensor._base is None else tensor._base
        return self._paths.get(id(base))

    def is_alone(self, tensor: Tensor) -> bool:
        """Whether no other tensor that was seen lies in the memory of ``tensor``."""
        return all(each is tensor for each in self._sharing.get(_storage(tensor), ()))

    def _keep(self, tensor: Tensor, node: Node | tuple[Node, int]) -> None:
        if id(tensor) not in self._nodes:
            self._alive.append(tensor)
            self._sharing.setdefault(_storage(tensor), []).append(tensor)
        self._nodes[id(tensor)] = node

    def _path(self, tensor: Tensor) -> str:
        if id(tensor) in self._paths:
            return self._paths[id(tensor)]
        if isinstance(tensor, FakeTensor):
            raise TracingError(
                f"a tensor of shape {list(tensor.shape)} comes from a function that cannot be seen"
            )
        place = self._places.get(_place(tensor))
        if place is not None:
            return place
        name = f"_tensor_constant{len(self.constants)}"
        self.constants[name] = tensor
        return name


def _named(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):  # neither parameter nor buffer
                yield f"{path}.{name}" if path else name, value


def _place(tensor: Tensor) -> object:
    """What two tensors over the same numbers have in common."""
    if tensor.is_meta:
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
