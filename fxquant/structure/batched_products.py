"""Attention whose products are batched over [batch * heads], as products of [batch, heads, ...]."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant.ir.builder import Builder
from fxquant.ir.graph import info
from fxquant.ir.operands import op_name
from fxquant.structure.attention import attention_path, behind, softmax_source
from fxquant.structure.vocabulary import Kind, is_a


def unbatch_products(gm: GraphModule, origin: str) -> None:
    """Write out the two products of every attention that calls bmm or baddbmm (XGLM, Bloom).

    before:  scores = baddbmm(bias, q, k^T, beta=b, alpha=a)        [batch * heads, queries, keys]
    after:   scores = flatten(matmul(unflatten(q * a), unflatten(k^T)) + unflatten(bias * b))
    """
    for softmax in [node for node in gm.graph.nodes if is_a(node, Kind.SOFTMAX)]:
        scores = softmax_source(softmax, _is_batched)
        output = behind(softmax, _is_batched)
        if scores is None or output is None or attention_path(gm, output) is None:
            continue
        for node in (scores, output):
            heads = _heads(node)
            if heads is not None:
                path = attention_path(gm, output) or info(gm).model
                _write_out(Builder(gm, origin, path), node, heads)


def _is_batched(node: Node) -> bool:
    return op_name(node) in ("bmm", "baddbmm")


def _heads(node: Node) -> int | None:
    """The second size of the view [batch, heads, queries, ...] that the product becomes."""
    for user in node.users:
        sizes = user.args[1:]
        if is_a(user, Kind.RESHAPE) and len(sizes) == 1 and isinstance(sizes[0], tuple | list):
            sizes = tuple(sizes[0])
        if is_a(user, Kind.RESHAPE) and len(sizes) == 4 and type(sizes[1]) is int:
            return sizes[1] if sizes[1] > 0 else None
    return None


def _write_out(build: Builder, node: Node, heads: int) -> None:
    graph = build.gm.graph
    names = ("input", "batch1", "batch2") if op_name(node) == "baddbmm" else ("input", "mat2")
    call: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    *bias, left, right = (call[name] for name in names)
    with graph.inserting_before(node):

        def apart(x: Node) -> Node:
            return build.method("unflatten", x, 0, (-1, heads))

        if call.get("alpha", 1) != 1:
            left = build.call(torch.mul, left, call["alpha"])
        product = build.call(torch.matmul, apart(left), apart(right))
        for each in bias if call.get("beta", 1) else ():
            each = build.call(torch.mul, each, call["beta"]) if call.get("beta", 1) != 1 else each
            product = build.call(torch.add, product, apart(each))
        result = build.call(torch.flatten, product, 0, 1)
    build.replace(node, result)
