"""The nodes that turn an input into codes and stored codes into numbers, on any grid."""

from __future__ import annotations

from torch.fx import Node

from fxquant.formats.grid import Grid
from fxquant.formats.integer import IntegerGrid
from fxquant.formats.scales import FP32
from fxquant.ir.builder import Builder
from fxquant.ir.legal_forms import OPS
from fxquant.numerics.weight_codes import GLOBAL_SCALE
from fxquant.schemes.specs import TensorSpec


def by_integers(spec: TensorSpec) -> bool:
    """Whether an input has the integer operators: whole codes, and no groups along K."""
    return isinstance(spec.grid, IntegerGrid) and spec.group_size is None


def choose(builder: Builder, x: Node, spec: TensorSpec) -> tuple[Node, Node | None]:
    """Nodes of the dynamic scale, float32, and zero point of x."""
    grid = spec.grid
    if spec.group_size is not None:
        return _choose_groups(builder, x, spec, spec.group_size), None
    if not isinstance(grid, IntegerGrid):
        scale = builder.call(
            OPS.choose_scale.default, x, spec.granularity, grid.name, name="input_scale"
        )
        return scale, None
    chosen = builder.call(
        OPS.choose_qparams.default,
        x,
        spec.granularity,
        not grid.has_zero_point,
        *grid.codes,
        name="qparams",
    )
    scale = builder.item(chosen, 0, "input_scale")
    return scale, builder.item(chosen, 1, "input_zero_point") if grid.has_zero_point else None


def _choose_groups(builder: Builder, x: Node, spec: TensorSpec, size: int) -> Node:
    names, shared = (spec.grid.name, spec.scale.name), None
    if spec.scale.two_level:
        shared = builder.call(OPS.choose_global_scale.default, x, *names, name="input_global_scale")
    plain = spec.scale == FP32
    chosen = builder.call(
        OPS.choose_group_scales.default,
        x,
        shared,
        *names,
        size,
        name="input_scale" if plain else "input_scale_q",
    )
    return chosen if plain else decoded(builder, chosen, shared, spec, "input_scale")


def decoded(
    builder: Builder, stored: Node, shared: Node | None, spec: TensorSpec, name: str
) -> Node:
    """The scales, float32, that stored ones stand for."""
    if spec.scale == FP32:
        return stored
    return builder.call(OPS.decode_scales.default, stored, shared, spec.scale.name, name=name)


def input_codes(
    builder: Builder, x: Node, spec: TensorSpec, scale: Node, zero_point: Node | None
) -> Node:
    """The numbers of x's codes; for integers these are the codes themselves."""
    grid = spec.grid
    if by_integers(spec):
        return builder.call(
            OPS.quantize.default, x, scale, zero_point, *grid.codes, grid.storage, name="x_q"
        )
    size = spec.group_size or 0
    codes = builder.call(OPS.quantize_to.default, x, scale, grid.name, size, name="x_q")
    return builder.call(OPS.decode.default, codes, grid.name, 0, name="x_v")


def unpacked(builder: Builder, grid: Grid, stored: Node, length: int) -> Node:
    """Numbers of the grid, one an element, from codes as they are stored."""
    if not isinstance(grid, IntegerGrid):
        return builder.call(OPS.decode.default, stored, grid.name, length, name="w_q")
    if grid.packed:
        return builder.call(OPS.unpack_int4.default, stored, length, name="w_q")
    return stored


def weight_node(builder: Builder, spec: TensorSpec, length: int, like: Node) -> Node:
    """The site's weight [N, K], dequantized."""
    codes = unpacked(builder, spec.grid, builder.attribute("weight"), length)
    stored = builder.attribute("weight_scale")
    shared = builder.attribute(GLOBAL_SCALE) if spec.scale.two_level else None
    scale = decoded(builder, stored, shared, spec, "w_scale")
    zero_point = builder.attribute("weight_zero_point") if spec.grid.has_zero_point else None
    return builder.call(
        OPS.dequantize.default, codes, scale, zero_point, spec.group_size or 0, like, name="w"
    )
