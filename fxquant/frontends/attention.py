"""An attention and a mask function that both front ends can follow, registered while tracing.

transformers builds masks with torch.vmap over tensors, which no front end can see through. The
official registries take other functions; ours evaluate the same mask by broadcasting index tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "fxquant"


def traceable_mask(
    *,
    batch_size: Any,
    kv_length: Any,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    device: torch.device | None = None,
    cache_position: Tensor | None = None,
    q_length: Any = None,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    **_: Any,
) -> Tensor:
    """Boolean [batch, 1, queries, keys], True where a query attends.

    Queries stand at ``cache_position`` (transformers 4) or at ``q_length`` places from ``q_offset``
    on (5).
    """
    place = attention_mask if cache_position is None else cache_position
    device = device if place is None else place.device
    batch = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.arange(1, device=device)[None, :, None, None]
    if cache_position is None:
        cache_position = torch.arange(q_length, device=device) + q_offset
    keys = (torch.arange(kv_length, device=device) + kv_offset)[None, None, None, :]
    mask = mask_function(batch, head, cache_position[None, None, :, None], keys)
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None, :].to(torch.bool)
    return mask


def _repeat_heads(x: Tensor, groups: int) -> Tensor:
    """[batch, kv_heads, length, width] to [batch, kv_heads * groups, length, width]."""
    batch, heads, length, width = x.shape
    x = x[:, :, None].expand(batch, heads, groups, length, width)
    return x.reshape(batch, heads * groups, length, width)


def attention_like(implementation: str | None) -> Callable[..., tuple[Tensor, None]]:
    """An attention function equal to transformers' ``implementation`` in what it computes.

    "sdpa" ignores ``softcap`` (Gemma 2), the others apply it; so does the returned function.
    ``s_aux`` (GPT-OSS): a score for each head that takes part in the softmax and weighs nothing.
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        groups = getattr(module, "num_key_value_groups", 1)
        if groups > 1:
            key, value = _repeat_heads(key, groups), _repeat_heads(value, groups)
        # OPT's own mask is one column too long under a tracer.
        attention_mask = attention_mask[:, :, :, : key.shape[-2]]
        softcap = None if implementation == "sdpa" else softcap
        if implementation == "eager" and scaling is None:
            scaling = _own_scaling(module)
        if softcap is not None or s_aux is not None:
            scores = _scores(query, key, attention_mask, scaling, softcap)
            out = torch.matmul(_shares(scores, s_aux).to(query.dtype), value)
        else:
            out = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, scale=scaling
            )
        return out.transpose(1, 2).contiguous(), None

    return attention


def _own_scaling(module: Any) -> float | None:
    """GPT-2's own function (transformers 4) reads its module's flags; torch's, "sdpa", does not."""
    if not hasattr(module, "scale_attn_by_inverse_layer_idx"):
        return None
    scaling = module.head_dim**-0.5 if module.scale_attn_weights else 1.0
    return float(scaling / (module.layer_idx + 1 if module.scale_attn_by_inverse_layer_idx else 1))


def _scores(
    query: Tensor, key: Tensor, mask: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """float32 [batch, heads, queries, keys]."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    # The lowest finite number, not -inf: a row of padding must not become NaN.
    return scores.float().masked_fill(torch.logical_not(mask), torch.finfo(torch.float32).min)


def _shares(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys, and over the head's sink [heads], which is left out."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    column = sinks.reshape(1, -1, 1, 1).to(scores.dtype)
    column = column.expand(scores.shape[0], scores.shape[1], scores.shape[2], 1)
    return torch.softmax(torch.cat((scores, column), dim=-1), dim=-1)[..., :-1]


@contextlib.contextmanager
def registered(implementation: str | None) -> Iterator[str]:
    """Register both functions under the yielded name, and take them away again.

    One caller at a time: the name is the same for all (``patching.LOCK``).
    """
    try:
        AttentionInterface.register(NAME, attention_like(implementation))
        AttentionMaskInterface.register(NAME, traceable_mask)
        yield NAME
    finally:
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop(NAME, None)
