"""integerize: replace the float op between quantize and dequantize by the exact integer GEMM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import VerificationError
from fxquant.formats.packing import unpack_int4
from fxquant.ir.builder import Builder
from fxquant.ir.graph import Level, Site, get_tensor, info, is_op, site_outputs
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.numerics.gemm import MAX_LENGTH, certified_chunk, reduced_precision
from fxquant.numerics.quantization import expand_groups, split_groups
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import FLOAT
from fxquant.structure.code_sites import has_integer_product, lower_codes
from fxquant.structure.product_sites import integerize_product


@dataclass(frozen=True)
class Integerize(Pass):
    """Lower weight-and-activation sites from qdq to integers; weight-only sites stay.

    before:  y = linear(dequantize(x_q, scale), dequantize(w_q, weight_scale), bias)
    after:   acc = int_gemm(x_q, w_q, chunk)
             y = add_bias(rescale(acc, scale, weight_scale, corrections), bias)

    By algebra: scales leave the sum, zero points become corrections by row sums of codes (Jacob et
    al. 2018, equation 7). Group scales cannot leave the sum: grouped_gemm rescales each group.
    Codes that are no integers, and inputs in groups, meet in code_gemm and grouped_code_gemm.
    """

    name = "integerize"
    requires = (Level.QDQ,)
    ensures = Level.INTEGER
    effect = "equivalent"

    def tolerance(self, dtype: torch.dtype) -> float:
        # Under TF32 or bf16 settings the float side of the comparison is the inexact one.
        reduced = reduced_precision("cpu") or reduced_precision("cuda")
        return super().tolerance(torch.bfloat16 if reduced else dtype)

    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        specs = {
            record.path: Scheme.parse(record.spec).spec
            for record in info(gm).site_records
            if not record.operand
        }
        for site, node in list(site_outputs(gm)):
            if integerize_product(gm, site, node):
                continue
            spec = specs.get(site.path, FLOAT)
            if spec.activation is not None and not has_integer_product(spec):
                lower_codes(gm, site.path, node, spec)
                continue
            pattern = match(node)
            if pattern is not None:
                _lower(gm, site, pattern)
        gm.graph.eliminate_dead_code()
        return gm


@dataclass(frozen=True)
class Pattern:
    """linear(dequantize(codes, ...), dequantize(weight, ...), bias), taken apart."""

    output: Node
    source: Node
    codes_dequantized: Node
    weight_dequantized: Node
    codes: Node
    scale: Node
    zero_point: Node | None
    max_code: int
    weight: Node
    weight_scale: Node
    weight_zero_point: Node | None
    group_size: int
    bias: Node | None


def match(node: Node) -> Pattern | None:
    """The pattern that ends in ``node``; None for weight-only sites and float ones."""
    if not is_op(node, nn.functional.linear):
        return None
    linear = operands(node)
    x, w = linear.input, linear.weight
    if not (is_op(x, OPS.dequantize.default) and is_op(w, OPS.dequantize.default)):
        return None
    activation, weight = operands(x), operands(w)
    if not is_op(activation.codes, OPS.quantize.default):
        return None
    quantized = operands(activation.codes)
    return Pattern(
        output=node,
        source=quantized.x,
        codes_dequantized=x,
        weight_dequantized=w,
        codes=activation.codes,
        scale=activation.scale,
        zero_point=activation.zero_point,
        max_code=max(-quantized.qmin, quantized.qmax),
        weight=weight.codes,
        weight_scale=weight.scale,
        weight_zero_point=weight.zero_point,
        group_size=weight.group_size,
        bias=linear.bias,
    )


def _weight_codes(gm: GraphModule, weight: Node) -> Tensor:
    if is_op(weight, OPS.unpack_int4.default):
        call = operands(weight)
        return unpack_int4(get_tensor(gm, call.packed), call.length)
    return get_tensor(gm, weight)


def _lower(gm: GraphModule, site: Site, p: Pattern) -> None:
    length = site.shape[1]
    if length > MAX_LENGTH:
        raise VerificationError(
            f"integerize: {site.path}: {length} input columns may overflow int32 (at most "
            f"{MAX_LENGTH}); leave the site in float or stop at level='qdq'"
        )
    sources = (p.codes_dequantized, p.weight_dequantized, p.output)
    builder = Builder(gm, Integerize.name, site.path, sources)
    codes = _weight_codes(gm, p.weight)
    with gm.graph.inserting_before(p.output):
        weight_sum = _weight_sum(gm, builder, p, codes)
        if p.group_size:
            acc = builder.call(
                OPS.grouped_gemm.default,
                p.codes,
                p.weight,
                p.weight_scale,
                p.zero_point,
                weight_sum,
                p.weight_zero_point,
                p.group_size,
                name="acc",
            )
            corrections: tuple[Node | None, ...] = (None, None, None, None, None)
        else:
            chunk = certified_chunk(codes, p.max_code)
            acc = builder.call(OPS.int_gemm.default, p.codes, p.weight, chunk, name="acc")
            corrections = _corrections(builder, p, weight_sum)
        y = _finish(builder, p, acc, corrections)
    builder.replace(p.output, y)


def _weight_sum(gm: GraphModule, builder: Builder, p: Pattern, codes: Tensor) -> Node | None:
    """Sums of (w_q - weight_zero_point) over K: int32 [N], or [N, G] for groups."""
    if p.zero_point is None:
        return None
    centred = codes.to(torch.int32)
    length = codes.shape[1]
    if p.weight_zero_point is not None:
        shift = get_tensor(gm, p.weight_zero_point)
        centred = centred - expand_groups(shift, length, p.group_size or None)
    if p.group_size:
        sums = split_groups(centred, p.group_size).sum(-1, dtype=torch.int32)
    else:
        sums = centred.sum(-1, dtype=torch.int32)
    gm.get_submodule(builder.site).register_buffer("weight_sum", sums)
    return builder.attribute("weight_sum")


def _corrections(builder: Builder, p: Pattern, weight_sum: Node | None) -> tuple[Node | None, ...]:
    """weight_scale, zero_point, weight_sum, weight_zero_point, x_sum, as rescale takes them.

    Per-channel values [N, 1] stand along the output's last dimension [N].
    """
    x_sum = None
    if p.weight_zero_point is not None:
        x_sum = builder.call(OPS.code_sum.default, p.codes, name="x_sum")
    flat = [
        None if node is None else builder.call(torch.flatten, node, name=name)
        for node, name in (
            (p.weight_scale, "weight_scale_row"),
            (p.weight_zero_point, "weight_zero_point_row"),
        )
    ]
    return flat[0], p.zero_point, weight_sum, flat[1], x_sum


def _finish(builder: Builder, p: Pattern, acc: Node, corrections: tuple[Node | None, ...]) -> Node:
    """rescale, then the bias; only the last of them casts to the model's dtype."""
    like = p.source if p.bias is None else None
    bare = p.bias is None
    name = "y" if bare else "rescaled"
    y = builder.call(
        OPS.rescale.default, acc, p.scale, *corrections, like, name=name, is_output=bare
    )
    if bare:
        return y
    return builder.call(OPS.add_bias.default, y, p.bias, p.source, name="y", is_output=True)
