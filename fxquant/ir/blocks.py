"""Where a place stands among a model's decoder blocks: the one answer, and the one segmenter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxquant.ir.graph import info, tag


def block_of(path: str, blocks: Iterable[str]) -> str | None:
    """The block that ``path`` names or lies in, None outside the blocks."""
    return next((b for b in blocks if path == b or path.startswith(f"{b}.")), None)


def within(path: str, block: str) -> str:
    """``path`` from the block on, ``mlp.up_proj``; whole where it does not lie in it."""
    return path.removeprefix(f"{block}.")


@dataclass(frozen=True)
class BlockStarts:
    """``first``: the node at which each block begins, in graph order. ``behind``: the first node
    behind the last block that calls or reads a leaf, None if there is none."""

    first: dict[str, Node]
    behind: Node | None


def block_starts(gm: GraphModule) -> BlockStarts:
    """Cut the graph at its decoder blocks.

    A block begins at the first node that calls or reads a leaf below its path, so its own first
    norm's parameters are inside.
    """
    blocks = info(gm).blocks
    first: dict[str, Node] = {}
    behind = None
    for node in gm.graph.nodes:
        path = place_of(node)
        block = block_of(path, blocks)
        if block is not None:
            first.setdefault(block, node)
            behind = None
        elif path and first and behind is None:
            behind = node
    return BlockStarts(first, behind)


def place_of(node: Node) -> str:
    """The leaf that a node calls or reads, else the site that it belongs to; empty without one."""
    leaf = node.op in ("call_module", "get_attr")
    return str(node.target) if leaf else tag(node).site or ""
