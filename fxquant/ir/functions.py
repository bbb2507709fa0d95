"""Functions of ours that a traced graph may call."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """Boolean [queries, keys], True on and below the diagonal, as is_causal has it."""
    ones = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
    return ones.tril()


def shared_heads(x: Tensor, query: Tensor) -> Tensor:
    """``x`` [batch, kv heads, ...] with each head repeated for the query heads that share it."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def hide(scores: Tensor, mask: Tensor) -> Tensor:
    """-infinity where the boolean mask is False."""
    return scores.masked_fill(mask.logical_not(), -torch.inf)


def default_mask(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor:
    """``attention_mask`` in int64, or all ones [batch, length]."""
    if attention_mask is None:
        return torch.ones_like(input_ids)
    return attention_mask.to(torch.int64)
