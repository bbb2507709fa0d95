"""Which linears make queries and keys: what is multiplied with each other inside attention."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from fxquant.ir.graph import is_linear, nodes_behind
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
    behind = nodes_behind(node.all_input_nodes, lambda n: is_a(n, kind) or is_linear(gm, n))
    return [found for found in behind if is_a(found, kind)]


def _linears_behind(gm: GraphModule, node: Node) -> Iterator[str]:
    for found in nodes_behind([node], lambda n: is_a(n, Kind.SHAPE) or is_linear(gm, n)):
        if is_linear(gm, found):
            yield str(found.target)
