"""Mixtures of experts as plain modules: each expert an nn.Linear or two, all of them always run.

Written apart from fxquant, of which it imports nothing; ``reference.swap`` quantizes the result.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` whose mixtures are PlainExperts and PlainBlocks, at the same paths."""
    found = copy.deepcopy(model)
    for path, module in list(found.named_modules()):
        if isinstance(getattr(module, "down_proj", None), nn.Parameter):
            found.set_submodule(path, PlainExperts(module))
        elif isinstance(getattr(module, "experts", None), nn.ModuleList):
            found.set_submodule(path, PlainBlock(module))
    return found


class PlainExperts(nn.Module):
    """``0.gate_up_proj``, ``0.down_proj``, ... with copies of the slices of 3-D parameters."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.number = experts.num_experts
        self.gate = [getattr(experts, "_apply_gate", None) or Clamped(experts)]  # no child
        transposed = not hasattr(experts, "_apply_gate") or experts.is_transposed
        for index in range(self.number):
            expert = nn.Module()
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(experts, name)[index].detach()
                weight = (weight.T if transposed else weight).clone()
                bias = getattr(experts, f"{name}_bias", None)
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
                linear.weight.data = weight
                if bias is not None:
                    linear.bias.data = bias[index].detach().clone()
                expert.add_module(name, linear)
            self.add_module(str(index), expert)

    def forward(self, hidden: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        result = torch.zeros_like(tokens)
        for index in range(self.number):
            expert: Any = getattr(self, str(index))
            share = share_of(index, router_indices, routing_weights)
            inner = self.gate[0](expert.gate_up_proj(tokens))
            result += expert.down_proj(inner) * share[:, None]
        return result.reshape(hidden.shape)


class PlainBlock(nn.Module):
    """A linear gate and a list of experts."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate, self.experts, self.top_k = block.gate, block.experts, block.top_k
        self.normed = getattr(block, "norm_topk_prob", True)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        logits = self.gate(tokens)
        weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        if self.normed:
            weights = weights / weights.sum(-1, keepdim=True)
        result = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            result += expert(tokens) * share_of(index, chosen, weights)[:, None]
        return result.reshape(hidden.shape), logits


class Clamped:
    """GPT-OSS's gate, as it writes it."""

    def __init__(self, experts: Any) -> None:
        self.alpha, self.limit = experts.alpha, experts.limit

    def __call__(self, both: Tensor) -> Tensor:
        gate, up = both[..., ::2], both[..., 1::2]
        gate = gate.clamp(max=self.limit)
        up = up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


def share_of(index: int, chosen: Tensor, weights: Tensor) -> Tensor:
    """What expert ``index`` weighs for each token; weights for those chosen or for all experts."""
    if weights.shape != chosen.shape:
        return weights[:, index]
    return (weights * (chosen == index)).sum(-1)
