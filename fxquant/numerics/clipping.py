"""What a quantizer clips, told from its input alone: no second quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.formats.grid import Grid
from fxquant.numerics.quantization import expand_groups, rounded_codes

# x / scale rounds by half an ulp and so does the guess below; one more for each, and the tie.
_NEIGHBOURS = 4


def unclipped_range(
    scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """The smallest and the largest float32 whose rounded code lies within [qmin, qmax].

    ``round_half_even(x / scale) + zero_point`` does not decrease with x, so that everything
    outside is clipped and nothing inside. Both have the shape of ``scale``, [1] for a 0-dim one,
    with which an fp16 x is compared in float32 (a 0-dim operand would be rounded to fp16).
    """
    scale = scale.reshape(1) if scale.dim() == 0 else scale
    shift = torch.zeros_like(scale) if zero_point is None else zero_point.to(torch.float32)
    # Seen from the other side of 0, the lower end is an upper one.
    low = -_last_unclipped(scale, -shift, -qmin)
    return low, _last_unclipped(scale, shift, qmax)


def _last_unclipped(scale: Tensor, shift: Tensor, qmax: int) -> Tensor:
    """The largest float32 x with ``round(x / scale) + shift <= qmax``, found among neighbours."""
    guess = (qmax - shift + 0.5) * scale
    below, above = [guess], [guess]
    for _ in range(_NEIGHBOURS):
        below.append(torch.nextafter(below[-1], torch.full_like(guess, -torch.inf)))
        above.append(torch.nextafter(above[-1], torch.full_like(guess, torch.inf)))
    candidates = torch.stack((*reversed(below), *above[1:]))
    fits = torch.div(candidates, scale).round() + shift <= qmax
    return torch.where(fits, candidates, -torch.inf).amax(0)


def count_clipped(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How many elements of x lie outside an ``unclipped_range``: int64, 0-dim."""
    return torch.count_nonzero(x < low) + torch.count_nonzero(x > high)


def clipped_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> Tensor:
    """The same for a range of x's own (scale [..., 1] or 0-dim), by its codes: int64, 0-dim.

    Such a range holds x but for roundings at its ends. On the CPU only rows whose ends are clipped
    are looked through.
    """
    if x.device.type == "cpu":
        ends = torch.stack((x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)))
        rows = _outside(ends, scale, zero_point, qmin, qmax).any(0).squeeze(-1)
        x = x[rows]
        scale = scale[rows] if scale.dim() else scale
        zero_point = zero_point[rows] if zero_point is not None and zero_point.dim() else zero_point
    return torch.count_nonzero(_outside(x, scale, zero_point, qmin, qmax))


def _outside(x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    codes = rounded_codes(x, scale, zero_point)
    return (codes < qmin) | (codes > qmax)


def beyond_grid(x: Tensor, scale: Tensor, grid: Grid, group_size: int | None = None) -> Tensor:
    """How many elements of x [..., K] saturate by more than they would be rounded: int64, 0-dim.

    Those whose ``x / scale`` lies beyond an end of the grid by over half of its last spacing.
    """
    low, *_, high = grid.levels
    low += (low - grid.levels[1]) / 2
    high += (high - grid.levels[-2]) / 2
    steps = x.to(torch.float32) / expand_groups(scale, x.shape[-1], group_size)
    return torch.count_nonzero((steps < low) | (steps > high))
