"""AWQ's clipping: the range of each row or group of a weight that disturbs the output least."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.quantization import split_groups
from fxquant.numerics.quantizer import global_scale_of, range_qparams
from fxquant.numerics.weight_codes import WeightCodes, least_error, round_to_nearest
from fxquant.schemes.specs import TensorSpec

# 1, 0.95, ... 0.55 of max|w|: auto_clip.py of AWQ (Lin et al. 2023) with n_grid 20, max_shrink 0.5.
SHRINKS = tuple(1 - step / 20 for step in range(10))


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
    limits = (largest * shrink for shrink in SHRINKS)
    stored = (spec.grid, spec.scale, global_scale_of(weight, spec))
    grids = (
        range_qparams(torch.maximum(low, -limit), torch.minimum(high, limit), *stored)
        for limit in limits
    )
    best = least_error(grids, lambda s, z: _output_error(grouped, s, z, spec, gram))
    return round_to_nearest(weight, spec, *best)


def _output_error(
    grouped: Tensor, scale: Tensor, zero_point: Tensor | None, spec: TensorSpec, gram: Tensor
) -> Tensor:
    """[N, G], or () where one scale serves the tensor."""
    s, z = (q if q is None or not q.dim() else q[..., None] for q in (scale, zero_point))
    assert s is not None
    error = spec.grid.nearest_(grouped / s, z).mul_(s) - grouped
    by_group = error.transpose(0, 1)
    squares = ((by_group @ gram.to(error.device)) * by_group).sum(-1).t()
    return squares if scale.dim() else squares.sum()
