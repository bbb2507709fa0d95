"""Coordinate descent on codes: re-round one column at a time given all the others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.numerics.quantization import check_finite, expand_groups
from fxquant.numerics.weight_codes import WeightCodes

# Of the largest diagonal element: fp32 sums say nothing about a column below.
_NEGLIGIBLE = 1e-20


def energy(weight: Tensor, hessian: Tensor) -> float:
    """``tr(W H W^T)`` of float [N, K] and [K, K], products in float32."""
    weight, hessian = weight.to(torch.float32), hessian.to(torch.float32)
    return float((weight @ hessian).mul_(weight).sum(dtype=torch.float64))


def coordinate_descent(
    weight: Tensor,
    hessian: Tensor,
    start: WeightCodes,
    *,
    steps: int = 4,
    damping: float = 0.01,
    block_size: int = 128,
) -> WeightCodes:
    """Codes on the grid of ``start`` with a smaller ``tr((W - Q) H (W - Q)^T)``.

    Behdin et al., "QuantEase", 2023, algorithm 1: column j goes to the code nearest to
    ``q_j + [(W - Q) H]_j / H_jj``, its optimum given the other columns; no move raises the error.
    The product (W - Q) H is kept up to date, lazily in blocks. Ours: H is damped. A column that
    few calibration tokens reach would otherwise go anywhere on its grid to serve those few.

    Args:
        weight: float [N, K].
        hessian: float [K, K], mean of x x^T up to a factor.
        start: codes from GPTQ or from rounding to nearest; scales and zero points stay.
        steps: how often each column is visited; stops earlier when no code changes.
        damping: added to the diagonal, as a share of its median over columns with inputs (the mean
            may be that of one outlier).

    Columns that no input reaches stay as they are. Raises CalibrationError (the Hessian is zero,
    negative or not finite) and NonFiniteError (the weight).
    """
    check_finite(weight, "the weight", "refine")
    diagonal = hessian.diagonal()
    usable = bool(torch.isfinite(hessian).all()) and bool((diagonal >= 0).all())
    if not usable or not bool((diagonal > 0).any()):
        raise CalibrationError(
            "refine: the Hessian is zero, negative on its diagonal or not finite: it is the mean "
            "of x x^T over calibration inputs; were there any?"
        )
    alive = diagonal > _NEGLIGIBLE * diagonal.max()
    hessian = (hessian / diagonal.max()).to(torch.float32)
    hessian.diagonal().add_(damping * hessian.diagonal()[alive].median())
    state = _State(weight, hessian, start, alive)
    for _ in range(steps):
        if not state.sweep(block_size):
            break
    return replace(start, codes=state.codes())


class _State:
    """Columns as contiguous rows: ``numbers`` of the grid and ``values`` [K, N], ``gradient``
    H (W - Q)^T."""

    def __init__(self, weight: Tensor, hessian: Tensor, start: WeightCodes, alive: Tensor) -> None:
        length, size = weight.shape[1], start.spec.group_size
        self.hessian = hessian
        self.grid = start.spec.grid
        rows = (len(weight), length)
        self.scales = expand_groups(start.scales, length, size).expand(rows).t()
        self.zeros = None
        if start.zero_points is not None:
            self.zeros = expand_groups(start.zero_points, length, size).expand(rows).t().float()
        self.numbers = self.grid.decode(start.codes.t())
        self.values = start.dequantize().t().contiguous()
        self.gradient = hessian @ (weight.to(torch.float32).t() - self.values)
        diagonal = hessian.diagonal()
        self.curvature = torch.where(alive, diagonal.reciprocal(), 0.0).tolist()

    def codes(self) -> Tensor:
        """[N, K]."""
        return self.grid.encode(self.numbers.t()).contiguous()

    def sweep(self, block_size: int) -> bool:
        """Visit every column once; whether any code changed."""
        changed = False
        for start in range(0, len(self.hessian), block_size):
            end = min(start + block_size, len(self.hessian))
            moves = self._block(start, end)
            if bool(moves.any()):
                changed = True
                self.gradient.addmm_(self.hessian[:, start:end], moves, alpha=-1)
        return changed

    def _block(self, start: int, end: int) -> Tensor:
        """What columns start..end move by, [end - start, N]."""
        moves = torch.zeros_like(self.values[start:end])
        for i in range(end - start):
            column = start + i
            gradient = self.gradient[column]
            if i:
                before = self.hessian[start:column, column]
                gradient = torch.addmv(gradient, moves[:i].t(), before, alpha=-1)
            if not self.curvature[column]:
                continue
            scale = self.scales[column]
            steps = torch.add(self.values[column], gradient, alpha=self.curvature[column])
            zeros = None if self.zeros is None else self.zeros[column]
            self.grid.nearest_(steps.div_(scale), zeros)
            self.numbers[column] = steps if zeros is None else steps + zeros
            value = steps.mul_(scale)
            torch.sub(value, self.values[column], out=moves[i])
            self.values[column] = value
        return moves
