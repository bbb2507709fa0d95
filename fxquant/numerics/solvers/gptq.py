"""GPTQ's solver: round a weight column by column, and let later columns make up for the error."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.formats.grid import Grid
from fxquant.numerics.quantization import check_finite
from fxquant.numerics.quantizer import global_scale_of
from fxquant.numerics.weight_codes import WeightCodes, search_scales
from fxquant.schemes.specs import TensorSpec

Order = Literal["none", "static"]
# The mean of the diagonal itself: more would drown what calibration says.
_MOST_DAMPING = 1.0
_LEAST_RAISED = 1e-3


def gptq(
    weight: Tensor,
    hessian: Tensor,
    spec: TensorSpec,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    order: Order = "none",
    grid: tuple[Tensor, Tensor | None] | None = None,
    global_scale: Tensor | None = None,
) -> WeightCodes:
    """Codes of ``weight`` that keep ``tr((W - Q) H (W - Q)^T)`` small.

    Frantar et al., "GPTQ", 2023, algorithm 1: with U the upper Cholesky factor of the inverse of
    H (H^-1 = U^T U), column i is rounded to nearest and its error ``(w_i - q_i) / U_ii`` times
    ``U_ij`` is taken from each later column j, lazily in blocks.

    Args:
        weight: float [N, K].
        hessian: float [K, K], mean of x x^T up to a factor.
        spec: number format, granularity "tensor", "channel" or "group"; a group size need divide
            neither K nor block_size.
        block_size: columns whose updates to later columns are gathered into one product.
        damping: added to the diagonal, as a share of its mean. Where the damped Hessian is not
            positive definite it is raised by factors of 10, to at most 1; the result says to what.
        order: "none": columns from left to right; "static": by falling diagonal (act-order), with
            scales of the groups as they lie in the weight.
        grid: scales float32 and zero points int32 as ``spec`` has them, chosen before. Without,
            they minimize ``sum_i ((w_i - q_i) / U_ii)^2``: GPTQ's own objective, where the paper
            takes the min-max range.
        global_scale: that of the grid's scales, where the spec's scales have one.

    Columns that no input reaches (diagonal 0) have no influence and are rounded to nearest.
    Returns WeightCodes on the weight's device. Raises CalibrationError for a Hessian that is all
    zero, not finite, or not positive definite at any damping; NonFiniteError for the weight.
    """
    _check(weight, hessian)
    columns = weight.shape[1]
    places = torch.arange(columns, device=weight.device)
    if order == "static":
        places = hessian.diagonal().argsort(descending=True, stable=True)
        hessian = hessian[places][:, places]
    upper, used, alive = inverse_factor(hessian, damping)
    back = places.argsort()
    importance = upper.diagonal().square().reciprocal() * alive
    if grid is None:
        grid, global_scale = _searched(weight, spec, importance[back])
    scales, zeros = grid
    codes = _round_columns(
        weight.to(torch.float32).t()[places],
        upper,
        scales,
        zeros,
        (places // (spec.group_size or columns)).tolist(),
        spec.grid,
        min(block_size, columns),
    )
    found = codes[back].t().contiguous()
    return WeightCodes(found, scales, zeros, spec, used, global_scale=global_scale)


def _check(weight: Tensor, hessian: Tensor) -> None:
    if weight.dim() != 2 or hessian.shape != (weight.shape[1],) * 2:
        raise ValueError(
            f"expected a weight [N, K] and a Hessian [K, K], got {list(weight.shape)} and "
            f"{list(hessian.shape)}"
        )
    check_finite(weight, "the weight", "gptq")


def _searched(
    weight: Tensor, spec: TensorSpec, importance: Tensor
) -> tuple[tuple[Tensor, Tensor | None], Tensor | None]:
    """Scales, zero points and what the scales share."""
    return search_scales(weight, spec, importance), global_scale_of(weight, spec)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float, Tensor]:
    """Upper U, float32 [K, K], with ``(H + damping mean(diag) 1)^-1 = U^T U``; see gptq.

    Returns U, the damping that sufficed, and which columns have inputs, bool [K].
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError(
            "gptq: the Hessian holds NaN or infinity: calibration inputs overflow; calibrate in "
            "fp32 or check the data"
        )
    alive = diagonal > 0
    if not bool(alive.any()) or bool((diagonal < 0).any()):
        raise CalibrationError(
            "gptq: the Hessian's diagonal is not positive anywhere or negative somewhere: it is "
            "the mean of x x^T over calibration inputs; were there any?"
        )
    mean = float(diagonal[alive].double().mean())
    while True:
        lower = _damped_factor(hessian, mean, alive, damping)
        if lower is not None:
            break
        if damping >= _MOST_DAMPING:
            raise CalibrationError(
                f"gptq: the Hessian is not positive definite even with damping {damping:g} (of the "
                "mean of its diagonal): calibrate with more tokens, and check that it is symmetric"
            )
        damping = min(max(10 * damping, _LEAST_RAISED), _MOST_DAMPING)
    inverse = _inverse_of_lower(lower)
    return inverse.flip(0, 1).div_(math.sqrt(mean)), damping, alive


def _damped_factor(hessian: Tensor, mean: float, alive: Tensor, damping: float) -> Tensor | None:
    """The Cholesky factor from the other end, H = R R^T with R upper: then U is its inverse.

    Lower float32, flipped; None where H is not positive definite. Two float64 matrices at a time:
    with K = 8192 each is half a gigabyte.
    """
    damped = hessian.flip(0, 1).to(torch.float64).div_(mean)
    damped.diagonal().add_((~alive).flip(0).double()).add_(damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    return None if int(failed) else lower.to(torch.float32)


def _inverse_of_lower(lower: Tensor) -> Tensor:
    """By halves, which leaves the zeros alone: a third of the work of solving for the identity."""
    size = len(lower)
    if size <= 128:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        solved: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return solved
    half = size // 2
    first, last = _inverse_of_lower(lower[:half, :half]), _inverse_of_lower(lower[half:, half:])
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = first
    inverse[half:, half:] = last
    inverse[half:, :half] = (last @ lower[half:, :half] @ first).neg_()
    return inverse


def _round_columns(
    columns: Tensor,
    upper: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    groups: list[int],
    grid: Grid,
    block_size: int,
) -> Tensor:
    """Codes [K, N] of ``columns`` [K, N], which it uses up; ``groups``: each one's group.

    Columns are rows here, so that all work is on contiguous memory; few and small operations each,
    since their number is K. ``steps`` are codes less zero points, ``errors`` are w - q; the
    division by U_ii is in ``ratios`` = U_ij / U_ii.
    """
    length, rows = columns.shape
    block_size = min(block_size, length)
    ratios = upper / upper.diagonal()[:, None]
    scale_rows = scales.expand(rows, -1).t().contiguous() if scales.dim() else scales.view(1, 1)
    of_group = list(scale_rows.unbind())
    zeros = None
    if zero_points is not None:
        shape = (rows, -1) if zero_points.dim() else (1, 1)
        zeros = zero_points.to(torch.float32).expand(shape).t().contiguous()
    rounders = [grid.rounder(None if zeros is None else zeros[g]) for g in range(len(of_group))]
    codes = torch.empty((length, rows), dtype=grid.storage, device=columns.device)
    steps, errors = columns.new_empty((2, block_size, rows))
    step_rows, error_rows, before = list(steps.unbind()), list(errors.unbind()), errors.t()
    for start in range(0, length, block_size):
        end = min(start + block_size, length)
        weights = list(ratios[start:end, start:end].t().contiguous().unbind())
        for i, column in enumerate(columns[start:end].unbind()):
            group, step = groups[start + i], step_rows[i]
            if i:
                column = torch.addmv(column, before[:, :i], weights[i][:i], alpha=-1)
            rounders[group](torch.div(column, of_group[group], out=step))
            torch.addcmul(column, step, of_group[group], value=-1, out=error_rows[i])
        used = end - start
        values = steps[:used]
        codes[start:end] = grid.encode(
            values if zeros is None else values + zeros[groups[start:end]]
        )
        if end < length:
            done = ratios[start:end, end:].t()
            columns[end:].addmm_(done, errors[:used], alpha=-1)
    return codes
