"""Nodes in words, and what a pass changed: cheap enough to take around every pass."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.ir.graph import tag
from fxquant.ir.records import Delta, NodeText, Tag
from fxquant.ir.size import short_dtype


def describe(gm: GraphModule) -> list[NodeText]:
    """Every node of the graph in words, in the order of evaluation."""
    return [_in_words(state) for state in _states(gm)]


def undo(after: Sequence[NodeText], delta: Delta) -> list[NodeText]:
    """The list of nodes before the pass, from that after it.

    Raises ValueError where the list cannot be that which the pass left.
    """
    if len(after) != delta.size:
        raise ValueError(f"{len(after)} nodes where the pass left {delta.size}")
    changed = set(delta.after)
    nodes = [node for index, node in enumerate(after) if index not in changed]
    for index, node in delta.before:  # ascending, so each index is final when it is used
        nodes.insert(index, node)
    return nodes


@dataclass(frozen=True)
class _State:
    """A node's fields by reference; torch.fx replaces args, it never changes them in place."""

    node: Node
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tag: Tag
    kind: str

    def same_as(self, other: _State) -> bool:
        return self.tag == other.tag and self.computes_as(other)

    def computes_as(self, other: _State) -> bool:
        """Whether it is the same node and calls the same of the same, whatever is known of it."""
        return (
            self.node is other.node
            and (self.args is other.args or self.args == other.args)
            and (self.target, self.kwargs, self.kind) == (other.target, other.kwargs, other.kind)
        )


@dataclass(frozen=True)
class Snapshot:
    """A graph at one moment: references to its nodes' fields, weak ones to its tensors.

    ``writes``: by leaf, a called module's plain settings, and of each tensor where its numbers are
    and how often it has been written into.
    """

    states: tuple[_State, ...]
    leaves: dict[str, tuple[weakref.ref[Any], ...]]
    writes: dict[str, tuple[Any, ...]]

    @classmethod
    def take(cls, gm: GraphModule) -> Snapshot:
        states = tuple(_states(gm))
        leaves = _leaves(gm, states)
        writes = {path: tuple(map(_writes, refs)) for path, refs in leaves.items()}
        for path in {str(state.target) for state in states if state.node.op == "call_module"}:
            writes[path] += _settings(gm.get_submodule(path))
        return cls(states, leaves, writes)

    def nodes(self) -> set[Node]:
        return {state.node for state in self.states}

    def changed_function(self, before: Snapshot) -> str | None:
        """The first node, or path of a leaf, that computes something else than before; None where
        the graph is the same function, whatever its nodes are said to be, as far as nodes,
        settings, storages and counted writes tell."""
        for old, new in itertools.zip_longest(before.states, self.states):
            if old is None or new is None or not new.computes_as(old):
                changed = next(state for state in (new, old) if state is not None)
                return f"node {changed.node.name}"
        for path, refs in self.leaves.items():
            same = _same_objects(refs, before.leaves[path])
            if not same or self.writes[path] != before.writes[path]:
                return path
        return None

    def since(self, before: Snapshot) -> tuple[Delta, frozenset[str]]:
        """What changed, and the sites where it did."""
        old = {state.node: state for state in before.states}
        new = {state.node: state for state in self.states}
        kept = [n for n, s in new.items() if n in old and s.same_as(old[n])]
        kept_set = set(kept)
        if [n for n in old if n in kept_set] != kept:
            kept_set = _same_order(list(old), kept)
        gone = [(i, s) for i, s in enumerate(before.states) if s.node not in kept_set]
        came = [(i, s) for i, s in enumerate(self.states) if s.node not in kept_set]
        leaves = tuple(
            path
            for path, refs in self.leaves.items()
            if path in before.leaves and not _same_objects(refs, before.leaves[path])
        )
        delta = Delta(
            before=tuple((i, _in_words(s)) for i, s in gone),
            after=tuple(i for i, _ in came),
            size=len(self.states),
            leaves=leaves,
        )
        site_of = {state.node.target: state.tag.site for state in self.states}
        sites = {s.tag.site for _, s in (*gone, *came)} | {site_of[path] for path in leaves}
        return delta, frozenset(site for site in sites if site)


def _states(gm: GraphModule) -> list[_State]:
    return [_State(n, n.target, n.args, n.kwargs, tag(n), _kind(gm, n)) for n in gm.graph.nodes]


def _kind(gm: GraphModule, node: Node) -> str:
    """The class of the module that a node calls, else nothing."""
    return type(gm.get_submodule(str(node.target))).__name__ if node.op == "call_module" else ""


def _leaves(gm: GraphModule, states: Sequence[_State]) -> dict[str, tuple[weakref.ref[Any], ...]]:
    """What each module or buffer that a node reads consists of.

    Weak: a snapshot must not keep float weights alive beside their codes.
    """
    found: dict[str, tuple[weakref.ref[Any], ...]] = {}
    for state in states:
        path = str(state.target)
        if state.node.op == "call_module":
            found[path] = tuple(map(weakref.ref, _tensors(gm.get_submodule(path))))
        elif state.node.op == "get_attr":
            owner, _, name = path.rpartition(".")
            module = gm.get_submodule(owner)
            # Not by attribute: that would read a streamed tensor from its file.
            found[path] = (weakref.ref({**module._parameters, **module._buffers}[name]),)
    return found


def _tensors(module: nn.Module) -> list[Tensor]:
    return [
        tensor
        for part in module.modules()
        for tensor in (*part._parameters.values(), *part._buffers.values())
        if tensor is not None
    ]


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """As eps. Not ``extra_repr``, which would read a streamed tensor from its file."""
    plain = (bool, int, float, str, tuple)
    return tuple(item for item in vars(module).items() if isinstance(item[1], plain))


def _writes(tensor: weakref.ref[Any]) -> tuple[int, int]:
    value = tensor()
    if value is None or value.is_inference():
        return 0, 0
    return value.untyped_storage()._cdata, value._version


def _same_objects(a: Sequence[weakref.ref[Any]], b: Sequence[weakref.ref[Any]]) -> bool:
    return len(a) == len(b) and all(
        x() is not None and x() is y() for x, y in zip(a, b, strict=True)
    )


def _same_order(before: Sequence[Node], kept: Sequence[Node]) -> set[Node]:
    """Of nodes that a pass moved, those that stand in one order in both lists."""
    position = {node: index for index, node in enumerate(before)}
    result: set[Node] = set()
    last = -1
    for node in kept:
        if position[node] > last:
            last = position[node]
            result.add(node)
    return result


def _in_words(state: _State) -> NodeText:
    node, op = state.node, state.node.op
    return NodeText(
        name=node.name,
        op=op,
        target=_function(state.target) if op == "call_function" else str(state.target),
        kind=state.kind,
        args=tuple(_operand(value) for value in state.args),
        kwargs=tuple((key, _operand(value)) for key, value in state.kwargs.items()),
        tag=state.tag,
    )


def _function(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.rpartition('::')[2]}"
    return str(getattr(target, "__name__", type(target).__name__))


def _operand(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_operand, value))})"
    if isinstance(value, slice):
        ends = ("" if end is None else _operand(end) for end in (value.start, value.stop))
        return ":".join(ends) + ("" if value.step is None else f":{_operand(value.step)}")
    if value is Ellipsis:
        return "..."
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, torch.dtype):
        return short_dtype(value)
    return repr(value) if isinstance(value, str) else str(value)
