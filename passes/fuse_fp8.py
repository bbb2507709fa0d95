"""fuse_fp8: the FP8 products of a graph of kernels in one node each, by the device's own GEMM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxquant.ir.builder import Builder
from fxquant.ir.graph import (
    Level,
    Site,
    add_note,
    info,
    is_op,
    site_outputs,
    source_of,
    update_info,
)
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.numerics.kernels.scaled_mm import without_layout
from fxquant.passes.fuse_kernels import FuseKernels
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass


@dataclass(frozen=True)
class FuseFp8(Pass):
    """Products of E4M3 codes leave the exact reference for ``torch._scaled_mm``.

    before:  y = add_bias(rescale(code_gemm(x_q, w_q), scale, weight_scale), bias)
    after:   y = code_linear(x_q, w_q, scale, weight_scale, bias)

    Not exact: a device adds the products in float32 or less, see ``kernels.scaled_mm``. Where no
    device takes the operands (another grid, groups, K or N no multiple of 16) a site stays as it
    is, with a note that says why; where this device does not, ``code_linear`` runs as the plain
    operators that it stands for.
    """

    name = "fuse_fp8"
    requires = (Level.KERNELS,)
    ensures = Level.INEXACT
    effect = "equivalent"

    def tolerance(self, dtype: torch.dtype) -> float:
        # Of a site's largest output. Kernels are held to the bound that is derived; sums that
        # cancel stay far from it, and 2% is what is published for sums of 4096 without promotion.
        return max(super().tolerance(dtype), 2.0**-5)

    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        for site, node in list(site_outputs(gm)):
            rescaled = operands(node).y if is_op(node, OPS.add_bias.default) else node
            sums = operands(rescaled).sums if is_op(rescaled, OPS.rescale.default) else None
            if is_op(sums, OPS.code_matmul.default):
                reason = "two activations, and torch._scaled_mm takes one matrix by a weight"
            elif is_op(sums, OPS.grouped_code_gemm.default):
                reason = "scales of groups, and torch._scaled_mm is asked for one a row or tensor"
            elif is_op(sums, OPS.code_gemm.default):
                reason = _why_not(site, node, rescaled, sums)
            else:
                continue  # integers, which are exact already, and floats
            if not reason:
                _fuse(gm, site, node, rescaled, sums)
            _note(gm, site.path, f"stays as at level integer: {reason}" if reason else _SAID)
        gm.graph.eliminate_dead_code()
        return gm


_SAID = "products by torch._scaled_mm where the device takes them, not exact"


def _note(gm: GraphModule, site: str, text: str) -> None:
    """In place of what fuse_kernels, which knows no FP8 product, said of the site."""
    kept = [n for n in info(gm).notes if (n.origin, n.site) != (FuseKernels.name, site)]
    update_info(gm, notes=tuple(kept))
    add_note(gm, FuseFp8.name, site, text)


def _why_not(site: Site, node: Node, rescaled: Node, sums: Node) -> str:
    gemm, scales = operands(sums), operands(rescaled)
    columns, length = site.shape
    layout = without_layout(gemm.x_grid, gemm.weight_grid, length, columns)
    if layout:
        return layout
    if len(sums.users) > 1 or (rescaled is not node and len(rescaled.users) > 1):
        return "something else reads its sums"
    codes, weight = gemm.x_codes, gemm.weight
    plain = is_op(codes, OPS.quantize_to.default) and weight.op == "get_attr"
    corrections = (gemm.zero_point, gemm.weight_zero_point, scales.zero_point, scales.x_sum)
    plain &= all(each is None for each in corrections) and is_op(scales.weight_scale, torch.flatten)
    whole = plain and operands(codes).x is operands(node).like
    same = whole and operands(codes).scale is scales.scale
    return "" if same else "its operands are not those that integerize writes"


def _fuse(gm: GraphModule, site: Site, node: Node, rescaled: Node, sums: Node) -> None:
    gemm, scales, output = operands(sums), operands(rescaled), operands(node)
    builder = Builder(gm, FuseFp8.name, site.path, (sums, rescaled, node))
    with gm.graph.inserting_before(node):
        y = builder.call(
            OPS.code_linear.default,
            *(gemm.x_codes, gemm.weight, scales.scale, source_of(scales.weight_scale)),
            None if node is rescaled else output.bias,
            *(output.like, gemm.x_grid, gemm.weight_grid),
            name="y",
            is_output=True,
        )
    builder.replace(node, y)
