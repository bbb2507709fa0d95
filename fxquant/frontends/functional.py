"""Writes into tensors of a traced graph, as nodes that make new ones where that is the same.

A graph that writes runs like the model, but a saved one may write only into what it surely made
itself, and passes that move nodes about need not think of memory.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, Node

from fxquant.ir.operands import op_name

# What makes memory of its own, and what gives another view of the same.
_MAKE = (
    *("arange", "clone", "cumsum", "empty", "empty_like", "full", "full_like", "new_empty"),
    *("new_full", "new_ones", "new_zeros", "ones", "ones_like", "zeros", "zeros_like"),
)
_NUMBERS = ("arange", "cumsum")
_VIEW = ("unsqueeze", "squeeze", "view", "transpose", "permute", "getitem")
# Methods that give the dtype of what they write into; add_ and add differ there.
_SAME_DTYPE = ("scatter_", "masked_fill_", "index_fill_", "index_copy_", "tril_", "triu_")
_ADD = (operator.add, operator.sub, operator.mul)


def make_functional(graph: Graph) -> None:
    """``x.scatter_(...)`` is ``x.scatter(...)``, and ``x[...] = x + 2`` is ``x + 2``, where ``x``
    is memory that the graph has made and that no other node reads."""
    for node in list(graph.nodes):
        if node.op == "call_method" and node.target in _SAME_DTYPE:
            if _is_own(node.args[0], node):
                node.target = str(node.target).removesuffix("_")
        elif node.op == "call_function" and node.target is operator.setitem:
            _make_sum(graph, node)


def _is_own(value: object, user: Node) -> bool:
    """Whether ``value`` is fresh, by way of views of it, and nothing but ``user`` reads it."""
    if not isinstance(value, Node) or list(value.users) != [user]:
        return False
    return op_name(value) in _MAKE or (
        op_name(value) in _VIEW and bool(value.args) and _is_own(value.args[0], value)
    )


def _is_own_number(value: object) -> bool:
    """Whether ``value`` is fresh and surely not bool, whose sum with a number is no bool."""
    if not isinstance(value, Node):
        return False
    if op_name(value) in _VIEW and bool(value.args):
        return _is_own(value.args[0], value) and _is_own_number(value.args[0])
    return op_name(value) in _NUMBERS


def _make_sum(graph: Graph, node: Node) -> None:
    """A number added in place: all that read the tensor afterwards read the sum."""
    target, value = node.args[0], node.args[2]
    if not isinstance(target, Node) or not isinstance(value, Node) or node.args[1] != ...:
        return
    added = value.op == "call_function" and value.target in _ADD and value.args[0] is target
    number = value.args[1] if added else None
    order = {each: place for place, each in enumerate(graph.nodes)}
    before = [user for user in target.users if order[user] < order[node]]
    fresh = _is_own_number(target)
    if type(number) is int and before == [value] and list(value.users) == [node] and fresh:
        graph.erase_node(node)
        target.replace_all_uses_with(value, lambda user: user is not value)
