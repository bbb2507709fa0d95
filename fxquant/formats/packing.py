"""Two 4-bit codes in a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes in -8..7 [N, K] to bytes [N, ceil(K / 2)], even columns in the low nibble."""
    even, odd = codes[:, 0::2], codes[:, 1::2]
    odd = torch.nn.functional.pad(odd, (0, even.shape[1] - odd.shape[1]))
    return _nibble(even) | (_nibble(odd) << 4)


def _nibble(codes: Tensor) -> Tensor:
    return codes.to(torch.uint8) & 0xF


def unpack_int4(packed: Tensor, length: int) -> Tensor:
    """The inverse of pack_int4: int8 codes [N, length]."""
    # Shifting a signed byte right carries its sign down.
    low = (packed << 4).view(torch.int8) >> 4
    high = packed.view(torch.int8) >> 4
    both = torch.stack((low, high), dim=-1).flatten(-2)
    return both if both.shape[-1] == length else both.narrow(-1, 0, length)
