"""Blocks of 32 columns as llama.cpp keeps them: fp16 numbers, then codes.

Q8_0  d, 32 int8                 x = d q
Q4_0  d, 16 bytes of nibbles     x = d (u - 8)      u = code + 8; the low nibbles are
Q4_1  d, m, 16 bytes             x = d u + m        columns 0 to 15, the high ones 16 to 31
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from fxquant.numerics.weight_codes import WeightCodes
from fxquant.schemes.specs import TensorSpec

SIZE: Final = 32
_LOWEST: Final = -8
# By the name of the grid: the block's name, and its bytes.
KINDS: Final = {"int8": ("Q8_0", 34), "int4": ("Q4_0", 18), "int4-asym": ("Q4_1", 20)}


def kind_of(spec: TensorSpec) -> str:
    """The name of the block that holds a weight of ``spec``, "" where there is none."""
    if spec.granularity != "group" or spec.group_size != SIZE:
        return ""
    return KINDS.get(spec.grid.name, ("", 0))[0]


def bytes_of(spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape in bytes of a weight [N, K] in blocks: [N, K / 32 blocks of so many]."""
    return shape[0], shape[1] // SIZE * KINDS[spec.grid.name][1]


def blocks(held: WeightCodes) -> Tensor:
    """uint8 [N, bytes]: codes under scales that are fp16 numbers.

    Raises ValueError where they, or minima beside them, are none.
    """
    rows = held.codes.shape[0]
    codes = held.codes.unflatten(1, (-1, SIZE))
    heads = [_half(held.scales)]
    if held.spec.grid.bits == 8:
        return torch.cat((*heads, codes.view(torch.uint8)), -1).reshape(rows, -1)
    if held.zero_points is not None:
        heads.append(_half((_LOWEST - held.zero_points) * held.scales))
    lifted = (codes - _LOWEST).to(torch.uint8)
    low, high = lifted.split(SIZE // 2, -1)
    return torch.cat((*heads, low | (high << 4)), -1).reshape(rows, -1)


def _half(values: Tensor) -> Tensor:
    """fp16 numbers [N, G] as bytes [N, G, 2]."""
    found = values.to(torch.float16)
    if not torch.equal(found.to(torch.float32), values.to(torch.float32)):
        raise ValueError("a scale or a minimum is no fp16 number: it would be rounded twice")
    return found.unsqueeze(-1).contiguous().view(torch.uint8)


def turned(held: WeightCodes, heads: int) -> WeightCodes:
    """Rows of each head's halves, which transformers rotates, as the pairs that llama.cpp does."""
    zeros = held.zero_points
    return replace(
        held,
        codes=pairs(held.codes, heads),
        scales=pairs(held.scales, heads),
        zero_points=None if zeros is None else pairs(zeros, heads),
    )


def pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * (2 * half), ...] in the order (first, second) of each pair."""
    halves: Tensor = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()
