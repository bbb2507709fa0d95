"""The loss straight from the head's input: logits a slice of the vocabulary at a time.

The head is a large share of a forward, and the tensor of all logits much of its cost: on the CPU
its pages are new at each call, and the loss reads them again from memory. A slice stays in a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.ir.graph import info, source_of
from fxquant.ir.streamed import plain_type
from fxquant.numerics.kernels.cpu_linear import linear
from fxquant.run.execution import Cut, Executor, OnNode
from fxquant.run.loss import check_logits

_COLUMNS = 2048


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
    return node if plain_type(gm.get_submodule(str(node.target))) is nn.Linear else None


def nll_to_the_end(
    executor: Executor,
    cut: Cut,
    head: Node,
    input_ids: Tensor,
    *,
    on_node: OnNode | None = None,
    instead: Mapping[Node, Callable[..., Any]] | None = None,
    highest: int | None = None,
) -> Tensor:
    """``token_nll`` of a run from ``cut`` to the end of a graph whose ``final_head`` is ``head``.

    The head and what stands behind it are not seen by ``on_node``. Raises as ``token_nll`` does.
    """
    behind = executor.advance(cut, head, on_node, instead)
    x, module = behind.values[source_of(head)], executor.leaf(head)
    assert isinstance(module, nn.Linear)
    if x.dtype != module.weight.dtype:  # the run of the node says what is wrong
        executor.advance(behind)
    check_logits(x[..., :1].expand(*x.shape[:-1], module.out_features), input_ids, highest)
    return head_nll(x, module, input_ids)


def head_nll(x: Tensor, head: nn.Linear, input_ids: Tensor) -> Tensor:
    """``token_nll(head(x), input_ids)`` [b, L - 1], float32, from x [b, L, K] and ids [b, L].

    Equal up to the order of summation; works under autograd.
    """
    rows, targets = x[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
    matrix, vector = head.weight, head.bias  # a streamed one reads them at each access
    totals = []
    wanted = torch.zeros(targets.shape, dtype=torch.float32, device=x.device)
    for start in range(0, head.out_features, _COLUMNS):
        bias = None if vector is None else vector[start : start + _COLUMNS]
        weight = matrix[start : start + _COLUMNS]
        logits = linear(rows, weight, bias).to(torch.float32)
        index = targets - start
        inside = (index >= 0) & (index < len(weight))
        found = logits.gather(1, index.clamp(0, len(weight) - 1)[:, None]).squeeze(1)
        wanted = torch.where(inside, found, wanted)
        totals.append(_log_sum_exp(logits))
    return (torch.stack(totals).logsumexp(0) - wanted).view(x.shape[0], -1)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """``logits.logsumexp(-1)``; without a gradient ``logits`` are written over."""
    if logits.requires_grad:
        return logits.logsumexp(-1)
    top = logits.amax(-1, keepdim=True)
    top.masked_fill_(torch.isinf(top), 0)
    return logits.sub_(top).exp_().sum(-1).log_().add_(top.squeeze(-1))
