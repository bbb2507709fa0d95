"""Lower a site whose codes have no integer product: code_gemm, rescale, bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxquant.formats.integer import IntegerGrid
from fxquant.ir.builder import Builder
from fxquant.ir.graph import is_op
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.schemes.specs import SiteSpec, TensorSpec
from fxquant.structure.code_nodes import by_integers


@dataclass(frozen=True)
class Operand:
    """One factor of a linear, dequantized: its codes as they are stored, their scale and grid."""

    codes: Node
    grid: str
    scale: Node
    zero_point: Node | None
    group_size: int


def has_integer_product(spec: SiteSpec) -> bool:
    """Whether weight and input of the site meet in an exact integer product."""
    weight, activation = spec.weight, spec.activation
    if weight is None or activation is None:
        return False
    return isinstance(weight.grid, IntegerGrid) and by_integers(activation.tensor)


def lower_codes(gm: GraphModule, site: str, node: Node, spec: SiteSpec) -> None:
    """``linear(dequantize(x), dequantize(w), b)`` becomes ``code_gemm``, ``rescale``, ``add_bias``.

    For sites whose input has codes, but no integer product with the weight's. Scales that are
    constant along K leave the sum; those of groups go with each group's.
    """
    assert spec.weight is not None
    assert spec.activation is not None
    linear = operands(node)
    x = _operand(linear.input, spec.activation.tensor)
    w = _operand(linear.weight, spec.weight)
    like = operands(linear.input).like
    builder = Builder(gm, "integerize", site, (linear.input, linear.weight, node))
    with gm.graph.inserting_before(node):
        acc, scale, weight_scale = _product(builder, x, w)
        bare = linear.bias is None
        corrections = (None, None, None, None)
        y = builder.call(
            OPS.rescale.default,
            acc,
            scale,
            weight_scale,
            *corrections,
            like if bare else None,
            name="y" if bare else "rescaled",
            is_output=bare,
        )
        if not bare:
            y = builder.call(OPS.add_bias.default, y, linear.bias, like, name="y", is_output=True)
    builder.replace(node, y)


def _product(builder: Builder, x: Operand, w: Operand) -> tuple[Node, Node | None, Node | None]:
    """The sums, and the scales that are left for rescale: the input's, the weight's as a row."""
    grids = (x.grid, w.grid)
    scales: tuple[Node | None, Node | None] = (x.scale, w.scale)
    if not (x.group_size or w.group_size):
        acc = builder.call(
            OPS.code_gemm.default,
            *(x.codes, w.codes, x.zero_point, w.zero_point, *grids),
            name="acc",
        )
    else:
        inside = [each.scale if each.group_size else None for each in (x, w)]
        acc = builder.call(
            OPS.grouped_code_gemm.default,
            *(x.codes, w.codes, *inside, x.zero_point, w.zero_point, *grids),
            *(x.group_size, w.group_size),
            name="acc",
        )
        scales = (None if x.group_size else x.scale, None if w.group_size else w.scale)
    if scales[1] is None:
        return acc, *scales
    return acc, scales[0], builder.call(torch.flatten, scales[1], name="weight_scale_row")


def _operand(dequantized: Node, spec: TensorSpec) -> Operand:
    call = operands(dequantized)
    codes = call.codes
    if is_op(codes, OPS.decode.default):
        codes = operands(codes).stored
    elif is_op(codes, OPS.unpack_int4.default):
        codes = operands(codes).packed
    return Operand(codes, spec.grid.name, call.scale, call.zero_point, spec.group_size or 0)
