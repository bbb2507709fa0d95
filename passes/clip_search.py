"""AWQ's clipping: the range of each row or group of a weight that disturbs the output least."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.observers import Observer
from fxquant.passes.weight_codes import WeightCodes, range_qparams, round_to_nearest
from fxquant.quantization import (
    dequantize,
    encode,
    group_count,
)
from fxquant.specs import TensorSpec

# 1, 0.95, ... 0.55 of max|w|: auto_clip.py of AWQ (Lin et al. 2023) with n_grid 20, max_shrink 0.5.
SHRINKS = tuple(1 - step / 20 for step in range(10))


class GroupGram(Observer):
    """X^T X of each group of columns: float32 [G, g, g], summed over tokens."""

    gram: Tensor

    def __init__(self, site: str, group_size: int | None) -> None:
        super().__init__(site)
        self.group_size = group_size
        self.register_buffer("gram", torch.empty(0))

    def update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        grouped = split_groups(rows.to(torch.float32), self.group_size).transpose(0, 1)
        product = grouped.transpose(1, 2) @ grouped
        self.gram = self.gram.add_(product) if self.gram.numel() else product


def split_groups(rows: Tensor, group_size: int | None) -> Tensor:
    """[N, K] as [N, G, g], the last group filled up with zeros; one group without a size."""
    columns = rows.shape[1]
    size = columns if group_size is None else min(group_size, columns)
    padding = group_count(columns, size) * size - columns
    return torch.nn.functional.pad(rows, (0, padding)).view(-1, group_count(columns, size), size)


def clipped_codes(weight: Tensor, spec: TensorSpec, gram: Tensor) -> WeightCodes:
    """Codes of ``weight`` [N, K] with its range clamped to a share of max|w|, out of SHRINKS.

    For each row and group (each row; the tensor, as ``spec`` says) the share with the least
    ``e G e^T``, e the row's error in the group and ``gram`` float32 [G, g, g] its inputs': the
    squared error of that group's part of the output. Ties keep the wider range.
    """
    grouped = split_groups(weight.float(), spec.group_size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    largest = torch.maximum(-low, high)
    if spec.granularity == "tensor":
        low, high, largest = low.amin(), high.amax(), largest.amax()
    best, scale, zero_point = torch.full_like(largest, torch.inf), largest, torch.zeros(())
    for shrink in SHRINKS:
        limit = largest * shrink
        s, z = range_qparams(torch.maximum(low, -limit), torch.minimum(high, limit), spec)
        error = _output_error(grouped, s, z, spec, gram)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero_point = torch.where(better, s, scale), torch.where(better, z, zero_point)
    return round_to_nearest(weight, spec, scale, zero_point.to(torch.int32))


def _output_error(
    grouped: Tensor, scale: Tensor, zero_point: Tensor, spec: TensorSpec, gram: Tensor
) -> Tensor:
    """[N, G], or () where one scale serves the tensor."""
    qmin, qmax = spec.qrange
    s, z = (q[..., None] if q.dim() else q for q in (scale, zero_point))
    error = dequantize(encode(grouped, s, z, qmin, qmax), s, z) - grouped
    by_group = error.transpose(0, 1)
    squares = ((by_group @ gram.to(error.device)) * by_group).sum(-1).t()
    return squares if scale.dim() else squares.sum()
