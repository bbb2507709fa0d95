"""A quantized linear computed from its codes, where the processor multiplies int8 itself.

An analysis runs the quantized rest of a model again and again: this halves what that takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.formats.grid import Grid
from fxquant.formats.integer import IntegerGrid
from fxquant.ir import operators
from fxquant.ir.graph import Site
from fxquant.numerics.cpu_int8 import exact_int_mm
from fxquant.numerics.gemm import CHUNK, MAX_LENGTH
from fxquant.numerics.quantizer import Quantizer
from fxquant.numerics.weight_codes import WeightCodes
from fxquant.schemes.specs import SiteSpec

PAYS = 2**16  # weights; below, the steps around the product cost as much as it saves


@dataclass(frozen=True, eq=False)
class Int8Product:
    """x̂ Ŵ^T + bias through exact int32 sums, as the integer graph has it: W's codes int8 [N, K]
    without zero points, their scales float32 [N] or (), and what the codes of each row sum to,
    int32 [N]."""

    codes: Tensor
    scales: Tensor
    sums: Tensor

    def __call__(self, quantizer: Quantizer, x: Tensor, bias: Tensor | None) -> Tensor:
        """float32 [..., N] of x float32 [..., K]; NaN in rows where x holds one."""
        scale, zero_point = quantizer.qparams(x)
        # Exact also where the processor's instructions are switched off by now.
        sums = operators.int_gemm(quantizer.codes(x, scale, zero_point), self.codes, CHUNK)
        shift = None if zero_point is None else self.sums
        like = x if bias is None else None
        y = operators.rescale(sums, scale, self.scales, zero_point, shift, None, None, like)
        return y if bias is None else operators.add_bias(y, bias, x)


def int8_product(
    site: Site, weight: Tensor, codes: WeightCodes, spec: SiteSpec
) -> Int8Product | None:
    """None where the site is not multiplied in int8 here."""
    if not multiplies_int8(weight.dtype, weight.device, site, spec):
        return None
    return Int8Product(codes.codes, codes.scales.flatten(), codes.codes.sum(1, dtype=torch.int32))


def multiplies_int8(dtype: torch.dtype, device: torch.device, site: Site, spec: SiteSpec) -> bool:
    """Whether a linear of this float dtype is computed in int8: not where float is as fast, or
    where it would not be the same function.

    A weight in half precision rounds what it multiplies; zero points or groups of the weight need
    more sums.
    """
    weight, activation = spec.weight, spec.activation
    if site.role not in ("linear", "head") or weight is None or activation is None:
        return False
    sums = not weight.grid.has_zero_point and weight.group_size is None
    kinds = all(_is_int8(each.grid) for each in (weight, activation.tensor))
    rows, length = site.shape
    pays = rows * length >= PAYS and length <= MAX_LENGTH
    whole = activation.tensor.granularity in ("tensor", "token")
    plain = dtype == torch.float32 and device.type == "cpu"
    return sums and kinds and pays and whole and plain and exact_int_mm()


def _is_int8(grid: Grid) -> bool:
    return isinstance(grid, IntegerGrid) and grid.bits <= 8
