"""The loss straight from the head's input: logits a slice of the vocabulary at a time.

An effect runs only the rest of a graph, of which the head is a large share; without a tensor of all
logits it costs a third less.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.ir.graph import info

_ROWS = 4096  # logits of 256 tokens stay in the cache


def final_head(gm: GraphModule) -> Node | None:
    """The head's node if its result is the graph's output as it is (no scaling, no soft cap)."""
    output = next(iter(reversed(gm.graph.nodes)))
    node = output.args[0]
    while isinstance(node, Node) and node.op == "call_method" and node.target == "contiguous":
        node = node.args[0]
    is_head = isinstance(node, Node) and node.op == "call_module" and node.target == info(gm).head
    if not is_head or len(node.users) > 1:
        return None
    assert isinstance(node, Node)
    return node if type(gm.get_submodule(str(node.target))) is nn.Linear else None


def head_nll(x: Tensor, head: nn.Linear, input_ids: Tensor) -> Tensor:
    """``token_nll(head(x), input_ids)`` [b, L - 1], float32, from x [b, L, K] and ids [b, L].

    Equal up to the order of summation; works under autograd.
    """
    rows, targets = x[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
    total = x.new_full(targets.shape, float("-inf"), dtype=torch.float32)
    wanted = torch.zeros_like(total)
    for start in range(0, head.out_features, _ROWS):
        bias = None if head.bias is None else head.bias[start : start + _ROWS]
        weight = head.weight[start : start + _ROWS]
        logits = nn.functional.linear(rows, weight, bias).to(torch.float32)
        total = torch.logaddexp(total, logits.logsumexp(-1))
        index = targets - start
        inside = (index >= 0) & (index < len(weight))
        found = logits.gather(1, index.clamp(0, len(weight) - 1)[:, None]).squeeze(1)
        wanted = torch.where(inside, found, wanted)
    return (total - wanted).view(x.shape[0], -1)
