"""Attention that is written out: a softmax between two matmuls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxquant.errors import ModelError
from fxquant.ir.blocks import block_of
from fxquant.ir.graph import LeftInFloat, info, is_linear, tag, update_info
from fxquant.ir.operands import op_name
from fxquant.structure.vocabulary import PRODUCTS, Kind, is_a

# What may stand between the two products: a scale, a mask, a soft cap, the softmax and its casts;
# sinks that are joined to the scores and cut off behind the softmax.
THROUGH = (
    *(Kind.SUM, Kind.PRODUCT, Kind.QUOTIENT, Kind.MASK, Kind.CAST, Kind.SQUASH, Kind.PICK),
    *(Kind.SAME, Kind.SOFTMAX, Kind.RESHAPE, Kind.JOIN, Kind.LARGER),
)


@dataclass(frozen=True)
class Product:
    """One attention: ``scores`` = matmul(q, k^T) and ``output`` = matmul(softmax(...), v), both of
    [batch, heads, ., .]; ``path`` of the module that they belong to."""

    path: str
    scores: Node
    output: Node


def attention_products(gm: GraphModule) -> Iterator[Product]:
    """Every attention that is written out: a softmax between two matmuls, inside a block."""
    for node in gm.graph.nodes:
        if is_a(node, Kind.SOFTMAX):
            scores, output = softmax_source(node, _is_matmul), behind(node, _is_matmul)
            path = None if output is None else attention_path(gm, output)
            if scores is not None and output is not None and path is not None:
                yield Product(path, scores, output)


def _is_matmul(node: Node) -> bool:
    return op_name(node) == "matmul"


def softmax_source(node: Node, wanted: Callable[[Node], bool]) -> Node | None:
    """The product whose scores the softmax ``node`` is of, by way of what may stand between."""
    while is_a(node, *THROUGH):
        source = through(node)
        if source is None:
            return None
        node = source
    return node if wanted(node) else None


def through(node: Node) -> Node | None:
    """The operand that carries the scores or probabilities: the first of what is joined."""
    source = node.args[1 if op_name(node) == "where" else 0]
    if is_a(node, Kind.JOIN) and isinstance(source, list | tuple):
        source = source[0]
    return source if isinstance(source, Node) else None


def behind(node: Node, wanted: Callable[[Node], bool]) -> Node | None:
    """The product that takes the probabilities, which the softmax ``node`` gives, as its left."""
    for user in node.users:
        if wanted(user) and user.args[0] is node:
            return user
        found = behind(user, wanted) if is_a(user, *THROUGH) else None
        if found is not None:
            return found
    return None


def attention_path(gm: GraphModule, output: Node) -> str | None:
    """The parent of the first linear behind ``output``, if that is inside a decoder block."""
    seen: set[Node] = set()
    queue = [output]
    while queue:
        node = queue.pop(0)
        if is_linear(gm, node):
            path = str(node.target).rpartition(".")[0]
            return None if block_of(path, info(gm).blocks) is None else path
        queue.extend(user for user in node.users if user not in seen)
        seen.update(node.users)
    return None


def written_out(gm: GraphModule, name: str) -> list[Product]:
    """Every attention of a model that has some; ModelError, naming pass ``name``, where none is."""
    found = list(attention_products(gm))
    if not found:
        raise ModelError(
            f"{name}: {info(gm).model}: no attention found in its blocks: a softmax between two "
            "matmuls of [batch, heads, tokens, ...] (a fused or batched form of its own?)"
        )
    return found


def recount_products(gm: GraphModule, before: list[LeftInFloat]) -> None:
    """Put the products that are in float now in place of those that were ``before``."""
    others = (entry for entry in info(gm).left_in_float if entry not in before)
    update_info(gm, left_in_float=(*others, *products_in_float(gm)))


def products_in_float(gm: GraphModule) -> list[LeftInFloat]:
    """The products of activations that are no sites, counted by operator."""
    products: dict[str, int] = {}
    for node in gm.graph.nodes:
        if is_a(node, *PRODUCTS) and not tag(node).is_output:
            name = op_name(node).removesuffix(".default")
            products[name] = products.get(name, 0) + 1
    reason = "products of activations (attention and rotary tables)"
    return [LeftInFloat(f"{name} x{count}", reason) for name, count in products.items()]
