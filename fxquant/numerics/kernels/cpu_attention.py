"""Causal attention on the CPU that leaves out more of what no query attends."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_QUERIES = 64
# Between these torch's kernel (2.13) takes all keys in one block, hidden or not; beyond, it skips
# blocks of 512 itself.
_SHORT, _LONG = 128, 768


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """softmax(query key^T * scale) value, each query on the keys up to its own place.

    query, key [batch, heads, length, width] and value, of one float dtype. The result's memory is
    laid out as [batch, length, heads, width], which is how the next layer reads it.
    """
    batch, heads, length, _ = query.shape
    out = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
    if not _SHORT < length < _LONG:
        whole = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        # The kernel's own layout is this one, mostly.
        return whole if whole.stride() == out.stride() else out.copy_(whole)
    # Row i hides what is beyond column length + i; every block's own mask is a part of it.
    hidden = query.new_zeros((_QUERIES, length + _QUERIES))
    hidden[:, length:].fill_(-torch.inf).triu_(1)
    for start in range(0, length, _QUERIES):
        end = min(start + _QUERIES, length)
        out[:, :, start:end] = scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, :end],
            value[:, :, :end],
            attn_mask=hidden[: end - start, length - start :][:, :end],
            scale=scale,
        )
    return out
