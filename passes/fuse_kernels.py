"""fuse_kernels: each quantized site in two nodes, the fused operators, to the same bits."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.ir.builder import Builder
from fxquant.ir.graph import Level, Site, add_note, is_op, site_outputs, source_of, tag
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import op_name, operands
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass


@dataclass(frozen=True)
class FuseKernels(Pass):
    """Range and codes of an input become one node, and what is made of the codes another.

    before:  scale = choose_qparams(x); x_q = quantize(x, scale)
             y = add_bias(rescale(int_gemm(x_q, w_q, chunk), scale, weight_scale), bias)
    after:   x_q, scale, zero_point, nan = quantize_rows(x)
             y = int_linear(x_q, w_q, scale, weight_scale, bias, nan)

    Groups become grouped_int_linear, weight-only sites dequant_linear, attention's products
    int_product. ``nan`` takes x's place as
    what gives the result's dtype and its rows of NaN, so x need not be kept. A site in another form
    stays as it is, with a note that says why.
    """

    name = "fuse_kernels"
    requires = (Level.INTEGER,)
    ensures = Level.KERNELS
    effect = "exact"

    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        # All are matched before any is changed: sites share inputs, and read each other's outputs.
        matched = [
            (site, _matched(site, node))
            for site, node in site_outputs(gm)
            if node.op != "call_module"  # those are float, and listed as that
        ]
        inputs: dict[Node, _Input] = {}
        for site, found in matched:
            if isinstance(found, str):
                add_note(gm, self.name, site.path, f"stays as at level integer: {found}")
            elif isinstance(found, _WeightOnly):
                _fuse_weight_only(gm, site, found)
            elif isinstance(found, _Product):
                _fuse_product(gm, site, found, inputs)
            else:
                _fuse_integer(gm, site, found, inputs)
        gm.graph.eliminate_dead_code()
        return gm


@dataclass(frozen=True)
class _WeightOnly:
    """linear(x, dequantize(weight, ...), bias), taken apart."""

    weight: Node
    output: Node


@dataclass(frozen=True)
class _Integers:
    """add_bias(rescale(sums(codes, weight), ...), bias), taken apart.

    ``output`` is ``rescaled`` itself where there is no bias.
    """

    codes: Node
    sums: Node
    rescaled: Node
    output: Node


@dataclass(frozen=True)
class _Product:
    """rescale(int_matmul(left, right), ...) of two quantized activations, taken apart."""

    left: Node
    right: Node
    sums: Node
    output: Node


@dataclass(frozen=True)
class _Input:
    """The nodes of an input's codes and ``nan``, which sites that read it share."""

    codes: Node
    nan: Node


def _matched(site: Site, node: Node) -> _WeightOnly | _Integers | _Product | str:
    """What the site's output is made of, or why that is no form that is fused."""
    if site.role == "matmul":
        return _product(node)
    if site.role == "embeddings":
        return "rows are looked up and nothing is multiplied"
    if is_op(node, nn.functional.linear):
        return _weight_only(site, node)
    rescaled = operands(node).y if is_op(node, OPS.add_bias.default) else node
    if not is_op(rescaled, OPS.rescale.default):
        return f"its output is made by {op_name(rescaled) or rescaled.op}"
    sums = operands(rescaled).sums
    if not (is_op(sums, OPS.int_gemm.default) or is_op(sums, OPS.grouped_gemm.default)):
        return f"its sums are made by {op_name(sums) or sums.op}"
    if len(sums.users) > 1 or (rescaled is not node and len(rescaled.users) > 1):
        return "something else reads its sums"
    gemm = operands(sums)
    whole = _reads_one_input(gemm, operands(rescaled), operands(node).like)
    if not whole or _weight_of(gemm.weight_codes, site) is None:
        return "its operands are not those that integerize writes"
    return _Integers(gemm.x_codes, sums, rescaled, node)


def _product(node: Node) -> _Product | str:
    """Of attention: its right operand, k^T, may be transposed behind its quantizer."""
    if not is_op(node, OPS.rescale.default):
        return f"its output is made by {op_name(node) or node.op}"
    rescale = operands(node)
    if not is_op(rescale.sums, OPS.int_matmul.default):
        return f"its sums are made by {op_name(rescale.sums) or rescale.sums.op}"
    if len(rescale.sums.users) > 1:
        return "something else reads its sums"
    codes = operands(rescale.sums)
    left, right = codes.left_codes, _turned(codes.right_codes)
    own = (rescale.zero_point, rescale.weight_sum, rescale.weight_zero_point, rescale.x_sum)
    whole = all(each is None for each in own)
    for side, scale in ((left, rescale.scale), (right, _right_scale(rescale.weight_scale))):
        whole &= is_op(side, OPS.quantize.default) and _quantizer(side) is not None
        whole = whole and operands(side).scale is scale and operands(side).zero_point is None
    if not whole or operands(left).x is not rescale.like:
        return "its operands are not those that integerize writes"
    return _Product(left, right, rescale.sums, node)


def _right_scale(node: Any) -> Any:
    """The scale of the right operand's quantizer: a static one is made a column's each."""
    return operands(node).scale if is_op(node, OPS.column_scales.default) else _turned(node)


def _turned(node: Any) -> Any:
    return source_of(node) if is_op(node, torch.transpose) else node


def _reads_one_input(gemm: Any, rescale: Any, x: object) -> bool:
    """Whether codes, scale, zero point and dtype are those of one quantized input."""
    if not is_op(gemm.x_codes, OPS.quantize.default):
        return False
    made = operands(gemm.x_codes)
    grouped = hasattr(gemm, "group_size")
    zero_point = gemm.zero_point if grouped else rescale.zero_point
    if grouped:
        own = (rescale.weight_scale, rescale.zero_point, rescale.weight_sum)
        plain = all(each is None for each in (*own, rescale.weight_zero_point, rescale.x_sum))
    else:
        shifted = rescale.weight_zero_point is not None
        plain = is_op(rescale.x_sum, OPS.code_sum.default) is shifted
        plain &= not shifted or operands(rescale.x_sum).codes is gemm.x_codes
    same = made.x is x and made.scale is rescale.scale and made.zero_point is zero_point
    return plain and same and _quantizer(gemm.x_codes) is not None


def _quantizer(codes: Node) -> Node | str | None:
    """The choose_qparams of a dynamic quantize, "static" for a calibrated one, None for others."""
    made = operands(codes)
    if isinstance(made.scale, Node) and made.scale.op == "get_attr":
        return "static"
    if not is_op(made.scale, operator.getitem):
        return None
    chosen = source_of(made.scale)
    if not is_op(chosen, OPS.choose_qparams.default):
        return None
    call = operands(chosen)
    wanted = [(chosen, 0)] if call.symmetric else [(chosen, 0), (chosen, 1)]
    items = [made.scale] if made.zero_point is None else [made.scale, made.zero_point]
    same = (call.x, call.qmin, call.qmax) == (made.x, made.qmin, made.qmax)
    readers = {reader for item in chosen.users for reader in item.users}
    alone = all(each is codes or not is_op(each, OPS.quantize.default) for each in readers)
    return chosen if same and alone and [item.args for item in items] == wanted else None


def _weight_of(codes: object, site: Site) -> tuple[Node, bool] | None:
    """The node that reads a weight's codes, and whether they are two a byte."""
    packed = is_op(codes, OPS.unpack_int4.default)
    if is_op(codes, OPS.unpack_int4.default):
        call = operands(codes)
        if call.length != site.shape[1]:
            return None
        codes = call.packed
    return (codes, packed) if isinstance(codes, Node) and codes.op == "get_attr" else None


def _weight_only(site: Site, node: Node) -> _WeightOnly | str:
    linear = operands(node)
    if not is_op(linear.weight, OPS.dequantize.default):
        return "its weight is float"
    weight = operands(linear.weight)
    if _weight_of(weight.codes, site) is None:
        made = weight.codes
        return f"the numbers of its weight are made by {op_name(made) or made.op}"
    if weight.like is not linear.input or len(linear.weight.users) > 1:
        return "its weight follows another input"
    return _WeightOnly(linear.weight, node)


def _fuse_weight_only(gm: GraphModule, site: Site, p: _WeightOnly) -> None:
    linear, weight = operands(p.output), operands(p.weight)
    stored = _weight_of(weight.codes, site)
    assert stored is not None
    builder = Builder(gm, FuseKernels.name, site.path, (p.weight, p.output))
    with gm.graph.inserting_before(p.output):
        y = builder.call(
            OPS.dequant_linear.default,
            linear.input,
            stored[0],
            weight.scale,
            weight.zero_point,
            linear.bias,
            weight.group_size,
            stored[1],
            name="y",
            is_output=True,
        )
    builder.replace(p.output, y)


def _fuse_integer(gm: GraphModule, site: Site, p: _Integers, inputs: dict[Node, _Input]) -> None:
    if p.codes not in inputs:
        inputs[p.codes] = _fuse_input(gm, p.codes)
    x = inputs[p.codes]
    gemm, rescale, output = operands(p.sums), operands(p.rescaled), operands(p.output)
    stored = _weight_of(gemm.weight_codes, site)
    assert stored is not None
    grouped = is_op(p.sums, OPS.grouped_gemm.default)
    own = gemm if grouped else rescale
    builder = Builder(gm, FuseKernels.name, site.path, (p.sums, p.rescaled, p.output))
    with gm.graph.inserting_before(p.output):
        y = builder.call(
            (OPS.grouped_int_linear if grouped else OPS.int_linear).default,
            x.codes,
            stored[0],
            rescale.scale,
            _unflattened(own.weight_scale),
            own.zero_point,
            own.weight_sum,
            _unflattened(own.weight_zero_point),
            None if p.output is p.rescaled else output.bias,
            x.nan,
            gemm.group_size if grouped else gemm.chunk,
            stored[1],
            name="y",
            is_output=True,
        )
    builder.replace(p.output, y)


def _fuse_product(gm: GraphModule, site: Site, p: _Product, inputs: dict[Node, _Input]) -> None:
    for codes, side in ((p.left, "left"), (p.right, "right")):
        if codes not in inputs:
            inputs[codes] = _fuse_input(gm, codes, (side, f"{side}_q", side))
    matrices, rescale = operands(p.sums), operands(p.output)
    builder = Builder(gm, FuseKernels.name, site.path, (p.sums, p.output))
    with gm.graph.inserting_before(p.output):
        y = builder.call(
            OPS.int_product.default,
            matrices.left_codes,
            matrices.right_codes,
            rescale.scale,
            rescale.weight_scale,
            inputs[p.left].nan,
            name="y",
            is_output=True,
        )
    builder.replace(p.output, y)


def _unflattened(node: Node | None) -> Node | None:
    return source_of(node) if is_op(node, torch.flatten) else node


def _fuse_input(
    gm: GraphModule, codes: Node, names: tuple[str, str, str] = ("x", "x_q", "input")
) -> _Input:
    """One node for the quantizer, in place of its range and its codes for all that read them.

    ``names``: of the node and of its codes; what the range's begin with.
    """
    whole, coded, side = names
    made, quantizer = operands(codes), _quantizer(codes)
    site = tag(codes).site or ""
    if isinstance(quantizer, Node):
        call = operands(quantizer)
        builder = Builder(gm, FuseKernels.name, site, (quantizer, codes))
        ends = (call.granularity, call.symmetric, call.qmin, call.qmax)
        with gm.graph.inserting_before(quantizer):
            fused = builder.call(OPS.quantize_rows.default, made.x, *ends, name=whole)
            parts = [
                builder.item(fused, index, name)
                for index, name in enumerate((coded, f"{side}_scale", f"{side}_zero_point", "nan"))
            ]
        for item in list(quantizer.users):
            builder.replace(item, parts[1 if item.args[1] == 0 else 2])
    else:
        builder = Builder(gm, FuseKernels.name, site, (codes,))
        ends = (made.scale, made.zero_point, made.qmin, made.qmax)
        with gm.graph.inserting_before(codes):
            fused = builder.call(OPS.quantize_static.default, made.x, *ends, name=whole)
            parts = [builder.item(fused, index, name) for index, name in enumerate((coded, "nan"))]
    builder.replace(codes, parts[0])
    return _Input(parts[0], parts[-1])
