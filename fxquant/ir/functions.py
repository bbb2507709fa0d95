"""Functions of ours that a traced graph may call."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """Boolean [queries, keys], True on and below the diagonal, as is_causal has it."""
    return _lower_triangle(query.shape[-2], key.shape[-2], query.device)


def _lower_triangle(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril()


def shared_heads(x: Tensor, query: Tensor) -> Tensor:
    """``x`` [batch, kv heads, ...] with each head repeated for the query heads that share it."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def attended_keys(attention_mask: Tensor | None) -> Tensor | None:
    """Boolean [batch, 1, length, length]: each token sees those up to itself that are no padding.

    None where no mask [batch, length] is given: then all see all before them, which attention
    knows without one.
    """
    if attention_mask is None:
        return None
    keys = attention_mask.to(torch.int64).to(torch.bool)
    return _lower_triangle(keys.shape[-1], keys.shape[-1], keys.device) & keys[:, None, None, :]


def hide(scores: Tensor, mask: Tensor | None) -> Tensor:
    """-infinity where the boolean mask is False; above the diagonal where there is none."""
    if mask is None:
        mask = _lower_triangle(scores.shape[-2], scores.shape[-1], scores.device)
    return scores.masked_fill(mask.logical_not(), -torch.inf)


def default_mask(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor:
    """``attention_mask`` in int64, or all ones [batch, length]."""
    if attention_mask is None:
        return torch.ones_like(input_ids)
    return attention_mask.to(torch.int64)
