"""Which linears make queries and keys: what is multiplied with each other inside attention."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from fxquant.ir.graph import LINEAR
from fxquant.ir.operands import operands
from fxquant.structure.vocabulary import Kind, is_a


def query_key_linears(gm: GraphModule) -> frozenset[str]:
    """Paths of the linears whose outputs feed QK^T; a fused projection counts as one of them."""
    return frozenset(
        path
        for node in gm.graph.nodes
        for operand in _score_operands(gm, node)
        for path in _linears_behind(gm, operand)
    )


def _score_operands(gm: GraphModule, node: Node) -> Iterator[Node]:
    if is_a(node, Kind.ATTENTION):
        attention = operands(node)
        yield from (attention.query, attention.key)
    elif is_a(node, Kind.SOFTMAX):
        for product in _nearest(gm, node, Kind.MATMUL):
            yield from product.all_input_nodes


def _nearest(gm: GraphModule, node: Node, kind: Kind) -> list[Node]:
    """The first nodes of this kind on every way back from ``node``, short of a linear."""
    found, todo, seen = [], list(node.all_input_nodes), set()
    while todo:
        current = todo.pop()
        if current in seen or _is_linear(gm, current):
            continue
        seen.add(current)
        if is_a(current, kind):
            found.append(current)
        else:
            todo.extend(current.all_input_nodes)
    return found


def _linears_behind(gm: GraphModule, node: Node) -> Iterator[str]:
    todo, seen = [node], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if _is_linear(gm, current):
            yield str(current.target)
        elif not is_a(current, Kind.SHAPE):
            todo.extend(current.all_input_nodes)


def _is_linear(gm: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), LINEAR)
