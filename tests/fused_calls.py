"""Random operands of the fused operators, with what makes kernels differ, and how they compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.formats.packing import pack_int4
from fxquant.numerics import quantization

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
DTYPES = (SINGLE, HALF, BRAIN)
GRAINS = ("token", "tensor")


def same(one: Any, other: Any) -> bool:
    """Bit for bit: dtypes, shapes, values and signs of zeros; a NaN is a NaN."""
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    equal = one == other
    if one.is_floating_point():
        equal = (equal & (one.signbit() == other.signbit())) | (one.isnan() & other.isnan())
    return bool(equal.all())


class Calls:
    """Operands by a seed. ``shape`` of the input [..., K], ``columns`` N of the weight."""

    def __init__(self, seed: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shape, self.dtype = tuple(shape), dtype

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def chance(self, share: float = 0.5) -> bool:
        return float(torch.rand((), generator=self.generator)) < share

    def codes(self, *shape: int, low: int = -128, high: int = 127) -> Tensor:
        """Half of them at the ends, where sums are largest."""
        mixed = torch.randint(low, high + 1, shape, generator=self.generator)
        ends = torch.randint(0, 2, shape, generator=self.generator) * (high - low) + low
        pick = torch.rand(shape, generator=self.generator) < 0.5
        return torch.where(pick, mixed, ends).to(torch.int8)

    def input(self) -> Tensor:
        """Rows of zeros, of one sign, of subnormal and of huge numbers, of ties, with NaN."""
        x = self.floats(*self.shape) * 3
        rows = x.view(-1, x.shape[-1])
        for row in rows:
            kind = int(torch.randint(0, 12, (), generator=self.generator))
            if kind == 0:
                row.zero_()
            elif kind == 1:
                row.abs_()
            elif kind == 2:
                row.mul_(1e-42)
            elif kind == 3:
                row.mul_(1e4)
            elif kind == 4:  # a scale of 1 or 0.5: many quotients are ties
                row.mul_(4).round_().mul_(0.5)
                row[0] = 127
            elif kind == 5:
                row[int(torch.randint(0, row.numel(), (), generator=self.generator))] = torch.nan
            elif kind == 6:
                row.neg_().abs_().neg_()
        return x.to(self.dtype)

    def nan(self) -> Tensor:
        return quantization.nan_rows(self.input()).to(self.dtype)

    def site(self, columns: int, group: int, packed: bool) -> tuple[Any, ...]:
        """Operands of int_linear (group 0) or grouped_int_linear, without the last two."""
        length, lead = self.shape[-1], self.shape[:-1]
        low, high = (-8, 7) if packed else (-128, 127)
        weight = self.codes(columns, length, low=low, high=high)
        grain = (*lead, 1) if self.chance() else ()
        groups = quantization.group_count(length, group) if group else 1
        scales = (columns, groups) if group or self.chance(0.7) else ()
        zero_point = weight_sum = shift = None
        if self.chance():
            zero_point = torch.randint(-128, 128, grain, generator=self.generator).to(torch.int32)
            sums = quantization.split_groups(weight.to(torch.int32), group or None).sum(
                -1, dtype=torch.int32
            )
            weight_sum = sums if group else sums.flatten()
        if self.chance():
            shift = torch.randint(-8, 8, scales, generator=self.generator).to(torch.int32)
        return (
            self.codes(*self.shape),
            pack_int4(weight) if packed else weight,
            torch.rand(grain, generator=self.generator) + 1e-3,
            torch.rand(scales, generator=self.generator) * 0.01,
            zero_point,
            weight_sum,
            shift,
            self.floats(columns).to(self.dtype) if self.chance() else None,
            self.nan(),
        )

    def product(self, length: int, columns: int) -> tuple[Any, ...]:
        """Operands of int_product: [..., M, length] by [..., length, columns]; the right lies as it
        is or turned, each has one scale or one for each token."""
        *batch, rows = self.shape
        left = self.codes(*batch, rows, length)
        right = self.codes(*batch, columns, length).transpose(-2, -1)
        right = right if self.chance() else right.contiguous()
        scales = [
            torch.rand(shape if self.chance() else (), generator=self.generator) + 1e-3
            for shape in ((*batch, rows, 1), (*batch, 1, columns))
        ]
        nan = torch.where(torch.rand(*batch, rows, 1, generator=self.generator) < 0.1, torch.nan, 0)
        return left, right, *scales, nan.to(self.dtype)

    def weight_only(self, columns: int, group: int, packed: bool) -> tuple[Any, ...]:
        """Operands of dequant_linear."""
        site = self.site(columns, group, packed)
        x = self.floats(*self.shape).to(self.dtype)
        return (x, site[1], site[3], site[6], site[7], group, packed)
