"""What llama.cpp makes of an input and a weight in blocks, by its rule, in float64.

Its CPU products take codes of the input too: 32 columns under d = absmax / 127, which is kept in
fp16, q = x (127 / absmax) to the nearest; beside Q4_1 also s = d sum(q) in fp16, for the least
number of each block. Weights in fp16 or bf16 take the input in that.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_SIZE: Final = 32
_FLOATS: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def product(x: Tensor, kind: str, stored: Tensor) -> Tensor:
    """fp64 [T, N] of x fp32 [T, K] and a weight as it stands in a file: floats [N, K], or blocks
    uint8 [N, bytes] of the kind named."""
    if kind in _FLOATS:
        return x.to(_FLOATS[kind]).double() @ stored.view(_FLOATS[kind]).double().T
    rows = x.unflatten(1, (-1, _SIZE))
    largest = rows.abs().amax(-1, keepdim=True)
    # A quotient: torch takes a number over a tensor as a product with the reciprocal.
    inverse = torch.full_like(largest, 127) / largest
    codes = (rows * torch.where(largest > 0, inverse, 0)).round().double()
    scale = largest / 127
    inputs = (codes * scale.half().double()).flatten(1)
    weight, least = read(kind, stored)
    if least is None:
        return torch.matmul(inputs, weight.T)
    sums = (scale[..., 0] * codes.sum(-1).float()).half().double()  # [T, G]
    steps = weight - least.repeat_interleave(_SIZE, 1)
    return torch.matmul(inputs, steps.T) + torch.matmul(sums, least.T)


def read(kind: str, stored: Tensor) -> tuple[Tensor, Tensor | None]:
    """Numbers fp64 [N, K] of blocks, and of Q4_1 the least number of each [N, G]."""
    head = {"Q8_0": 2, "Q4_0": 2, "Q4_1": 4}[kind]
    block = stored.unflatten(1, (-1, head + (_SIZE if kind == "Q8_0" else _SIZE // 2)))
    heads = block[..., :head].contiguous().view(torch.float16).double()
    data = block[..., head:].contiguous()
    if kind == "Q8_0":
        return (data.view(torch.int8).double() * heads[..., :1]).flatten(1), None
    codes = torch.cat((data & 15, data >> 4), -1).double()
    if kind == "Q4_0":
        return ((codes - 8) * heads[..., :1]).flatten(1), None
    least = heads[..., 1:]
    return (codes * heads[..., :1] + least).flatten(1), least[..., 0]
