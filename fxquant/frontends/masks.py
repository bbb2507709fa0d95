"""Fused attention as the operator ``attention``, without a mask where a mask is only causal.

A traced graph makes a mask [batch, 1, length, length] out of operators of its own. Where that mask
hides what comes later and padding, and nothing else, ``attended_keys`` takes its place: it gives
None for a call without attention_mask, and no such mask is made. Sliding windows, biases and
whatever is not understood keep the nodes that they have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxquant.frontends.mask_values import WRITES, mask_cone, mask_values, written_tensor
from fxquant.ir.functions import attended_keys
from fxquant.ir.graph import Tag, set_tag, tag
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import op_name, operands

_SDPA = torch.nn.functional.scaled_dot_product_attention
_LENGTHS = (6, 11)
_MADE = ("clone", "full", "zeros", "ones", "empty", "full_like", "zeros_like", "ones_like")


def fuse_masks(gm: GraphModule) -> None:
    """Put ``attention`` in place of every scaled_dot_product_attention that is given a mask."""
    causal: dict[tuple[Node, bool], bool] = {}
    mask: Node | None = None
    for node in [node for node in gm.graph.nodes if node.target is _SDPA]:
        call = operands(node)
        if not isinstance(call.attn_mask, Node) or call.dropout_p or call.is_causal:
            continue
        if call.enable_gqa:
            continue
        whole = _untrimmed(call.attn_mask)
        asked = (whole, whole is not call.attn_mask)
        if asked not in causal:
            causal[asked] = _is_causal(gm, *asked)
        if causal[asked]:
            mask = mask or _attended_keys(gm.graph)
        chosen = mask if causal[asked] else call.attn_mask
        _replace(node, call.query, call.key, call.value, chosen, call.scale)
    replaced = {base for (base, _), only in causal.items() if only}
    _erase_dead_writes(gm.graph, {node for base in replaced for node in mask_cone(gm, base)})


def _replace(old: Node, *args: Any) -> None:
    with old.graph.inserting_before(old):
        new = old.graph.create_node("call_function", OPS.attention.default, args, name="attention")
    new.meta = dict(old.meta)
    set_tag(new, tag(old))
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _attended_keys(graph: Graph) -> Node:
    _, mask = (node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(mask):
        made = graph.call_function(attended_keys, (mask,))
    set_tag(made, Tag())
    return made


def _untrimmed(mask: Node) -> Node:
    """The mask of which ``mask`` takes the first columns, as many as there are keys."""
    source, index = (*mask.args, None, None)[:2]
    if op_name(mask) != "getitem" or not isinstance(source, Node) or not isinstance(index, tuple):
        return mask
    *others, last = index
    trims = isinstance(last, slice) and last.start is None and last.step is None
    if others == [slice(None)] * 3 and trims and isinstance(last.stop, Node):
        return source
    return mask


def _is_causal(gm: GraphModule, mask: Node, trimmed: bool) -> bool:
    """Whether ``mask`` hides later tokens and padding and nothing else, whatever the length.

    ``trimmed``: it is read as far as there are keys. Tried on short rows. What hides by distance
    reads the distance, which ``mask_values`` refuses.
    """
    for length in _LENGTHS:
        given = _paddings(length)
        value = mask_values(gm, mask, given)
        if value is None or not (trimmed or value.shape[-1] == length):
            return False
        if not _hides_the_same(value[..., :length], given):
            return False
    return True


def _paddings(length: int) -> Tensor:
    """int64 [5, length]: no padding, some left, right, on both sides, and in the middle."""
    rows = torch.ones(5, length, dtype=torch.int64)
    rows[1, :2] = rows[2, -2:] = rows[3, :1] = rows[3, -1:] = rows[4, 2:4] = 0
    return rows


def _hides_the_same(mask: Tensor, attention_mask: Tensor) -> bool:
    """Whether ``mask``, True or 0 where a query attends, is that of ``attended_keys``.

    Queries that see nothing are padding: masks differ in what these see instead.
    """
    expected = attended_keys(attention_mask)
    assert expected is not None
    if mask.dim() > 4 or (mask.dim() == 4 and mask.shape[1] != 1):
        return False
    if mask.dtype == torch.bool:
        seen = mask
    elif mask.is_floating_point():
        seen = mask == 0
        lowest = (mask == torch.finfo(mask.dtype).min) | (mask == -torch.inf)
        if not bool((seen | lowest).all()):
            return False
    else:
        return False
    try:
        seen = seen.expand(expected.shape)
    except RuntimeError:  # of another shape
        return False
    return bool(((seen == expected) | ~expected.any(-1, keepdim=True)).all())


def _erase_dead_writes(graph: Graph, among: set[Node]) -> None:
    """Take out nodes ``among`` that write into a tensor that nothing reads any more.

    torch.fx keeps whatever writes, and with it all that the write is made of.
    """
    writes = [node for node in graph.nodes if node in among and op_name(node) in WRITES]
    live = _behind(node for node in graph.nodes if node.op == "output")
    live |= _behind(node for node in graph.nodes if op_name(node) in WRITES and node not in writes)
    waiting = writes
    while revived := [node for node in waiting if not _is_dead(node, live)]:
        live |= _behind(revived)
        waiting = [node for node in waiting if node not in revived]
    for node in reversed(waiting):
        if not node.users:
            graph.erase_node(node)


def _is_dead(write: Node, live: set[Node]) -> bool:
    target = written_tensor(write)
    return op_name(target) in _MADE and target not in live


def _behind(nodes: Iterator[Node] | list[Node]) -> set[Node]:
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found
