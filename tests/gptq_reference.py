"""The reference GPTQ (IST-DASLab gptq.py, semantics of `fasterquant`), plainly, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.numerics.quantization import choose_qparams
from fxquant.schemes.specs import TensorSpec


@dataclass(frozen=True)
class Synthetic:
    """A layer with correlated inputs whose channels have log-normal scales."""

    weight: Tensor
    inputs: Tensor

    @property
    def hessian(self) -> Tensor:
        return self.inputs.T @ self.inputs / len(self.inputs)

    def error(self, approximation: Tensor) -> float:
        """``||(W - Q) X||^2 / ||W X||^2`` in float64."""
        weight, x = self.weight.double(), self.inputs.double()
        lost = ((weight - approximation.double()) @ x.T).square().sum()
        return float(lost / (weight @ x.T).square().sum())


def synthetic(rows: int = 96, columns: int = 256, samples: int = 4096, seed: int = 7) -> Synthetic:
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / math.sqrt(columns)
    scales = torch.exp(torch.randn(columns, generator=generator))
    inputs = torch.randn(samples, columns, generator=generator) @ mixing
    inputs = (inputs + 0.3 * torch.randn(samples, columns, generator=generator)) * scales
    return Synthetic(weight, inputs)


def min_max(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, int]:
    """Scale and zero point [N, 1] of codes 0 .. 2^bits - 1, as the reference's Quantizer."""
    low = weight.amin(1, keepdim=True).clamp(max=0)
    high = weight.amax(1, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    if symmetric:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    scale = (high - low) / top
    zero = torch.full_like(scale, (top + 1) / 2) if symmetric else torch.round(-low / scale)
    return scale, zero, top


def min_max_grid(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Scales and zero points as quantize takes them, with no search."""
    return choose_qparams(
        weight,
        *spec.grid.codes,
        symmetric=(not spec.grid.has_zero_point),
        granularity=spec.granularity,
        group_size=spec.group_size,
    )


def rounded(weight: Tensor, grid: tuple[Tensor, Tensor, int]) -> Tensor:
    scale, zero, top = grid
    return scale * (torch.clamp(torch.round(weight / scale) + zero, 0, top) - zero)


def reference_gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    symmetric: bool,
    group_size: int | None,
    order: str,
    damping: float = 0.01,
) -> Tensor:
    """The dequantized weight. Groups follow the updated weight, or are static under act-order."""
    w, h = weight.double().clone(), hessian.double().clone()
    columns = w.shape[1]
    size = group_size or columns
    first = [min_max(w[:, g : g + size], bits, symmetric) for g in range(0, columns, size)]
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    permutation = torch.arange(columns)
    if order == "static":
        permutation = torch.argsort(h.diagonal(), descending=True)
    w, h = w[:, permutation], h[permutation][:, permutation]
    h += damping * h.diagonal().mean() * torch.eye(columns, dtype=h.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    result = torch.zeros_like(w)
    grid = first[0]
    for i in range(columns):
        if order == "static":
            grid = first[int(permutation[i]) // size]
        elif group_size is not None and i % size == 0:
            grid = min_max(w[:, i : i + size], bits, symmetric)
        result[:, i] = rounded(w[:, i : i + 1], grid)[:, 0]
        error = (w[:, i] - result[:, i]) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
    return result[:, torch.argsort(permutation)]
