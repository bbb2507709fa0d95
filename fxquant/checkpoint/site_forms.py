"""What the nodes of each site do, read back from the graph and compared with its scheme.

A scheme's text is printed as what the graph computes: so its sites are the forms that quantize and
integerize write for that text, over the site's own codes, scales and recorded range.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.checkpoint.saved_specs import expected_specs
from fxquant.checkpoint.site_parts import SiteParts
from fxquant.errors import CheckpointError
from fxquant.formats.grid import Grid
from fxquant.formats.integer import IntegerGrid
from fxquant.ir.graph import Level, info, is_op, site_outputs
from fxquant.ir.leaves import Conv1D, Fp32Linear, QuantizedParameters
from fxquant.ir.legal_forms import OPS, STORES
from fxquant.ir.operands import operands
from fxquant.ir.records import PassRecord
from fxquant.schemes.named import format8_of
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import ActivationSpec, TensorSpec
from fxquant.schemes.spelling import Scanner, scan_repair
from fxquant.structure.code_sites import has_integer_product
from fxquant.structure.product_sites import operand_spec

_CODES = (OPS.quantize.default, OPS.quantize_to.default)
_CHOICES = (
    *(OPS.choose_qparams.default, OPS.choose_scale.default),
    *(OPS.choose_group_scales.default, OPS.choose_global_scale.default),
)


def check_forms(gm: GraphModule) -> None:
    """Raise CheckpointError, with the site, where its nodes are not what the scheme says.

    At levels qdq and integer: bits, zero points, granularity, groups, whether a range is static and
    the scale it is recorded with; at all levels the shapes of what stays float.
    """
    facts = info(gm)
    scheme = Scheme.parse(facts.scheme)
    found = Counter(site.path for site, _ in site_outputs(gm))
    for path, count in found.items():
        if count > 1:
            raise CheckpointError(f"{path}: {count} nodes are its output")
    records = {(each.path, each.operand): each for each in facts.site_records}
    coded = facts.level in (Level.QDQ, Level.INTEGER)
    seen: set[Node] = set()
    for site, node in site_outputs(gm):
        _Form(gm, site, scheme, records, seen).check(node, coded)
    for node in gm.graph.nodes:
        if node.target in (*_CODES, *_CHOICES) and node not in seen:
            raise CheckpointError(f"node {node.name}: codes of an input that is no site's")
    _check_cache(gm)


def _check_cache(gm: GraphModule) -> None:
    """A cache is stored in the format of the pass that is said to have run."""
    wanted = {kept: record.name for record in info(gm).history for kept in _kept_by(record)}
    found = set()
    for node in gm.graph.nodes:
        if node.target not in STORES:
            continue
        own = vars(operands(node)).get("bits") or operands(node).grid
        found.add(own)
        if own not in wanted:
            what = own if isinstance(own, str) else f"{own!r} bits"
            passes = " and ".join(f"{n} in {kept}" for kept, n in wanted.items()) or "none"
            raise CheckpointError(
                f"node {node.name}: a cache of {what}, and the passes in the graph's history that "
                f"store one are: {passes}"
            )
    for kept, name in wanted.items():
        if kept not in found:
            raise CheckpointError(f"info: {name} is in the history, but nothing stores its cache")


def _kept_by(record: PassRecord) -> Iterator[int | str]:
    """How a pass that is recorded stores a cache: integers by their bits, others by their grid."""
    if record.name == "kv4":
        yield 4
    if record.name == "kv8":
        grid = format8_of(scan_repair(Scanner(record.spelling or record.name))[1])
        yield 8 if isinstance(grid, IntegerGrid) else grid.name


class _Form(SiteParts):
    """One site: what its nodes are at each level."""

    def check(self, node: Node, coded: bool) -> None:
        if self.site.role == "matmul":
            own = operand_spec(self.scheme, self.site) if coded else None
            if own is not None:
                self._product(node, own.tensor.grid)
            return
        spec = self.scheme.spec_for(self.site.path, self.site.role)
        if not coded or spec.weight is None:
            self._float(node)
        elif self.site.role == "embeddings":
            self._dequantized_weight(node, spec.weight)
        elif spec.activation is None or info(self.gm).level == Level.QDQ:
            self._linear(node, spec.weight, spec.activation)
        elif has_integer_product(spec):
            self._integer(node, spec.weight, spec.activation)
        else:
            self._coded(node, spec.weight, spec.activation)

    def _float(self, node: Node) -> None:
        module = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is None or node.target != self.site.path:
            self.fail("its output is not that of its float module")
        fp32 = self.scheme.fp32_gemm and self.site.role == "linear"
        if isinstance(module, QuantizedParameters) or isinstance(module, Fp32Linear) is not fp32:
            self.fail(f"its module is a {type(module).__name__}")
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            self.fail(f"its module, a {type(module).__name__}, has no weight")
        shape = tuple(weight.shape)[:: -1 if isinstance(module, Conv1D) else 1]
        if shape != self.site.shape:
            self.fail(f"a weight of {list(shape)}, recorded as {list(self.site.shape)}")

    def _bias(self, node: object) -> None:
        self._own(node, "bias", self.site.bias)

    def _linear(self, node: Node, weight: TensorSpec, spec: ActivationSpec | None) -> None:
        call = operands(self._is(node, nn.functional.linear))
        self._dequantized_weight(call.weight, weight)
        self._bias(call.bias)
        codes = operands(call.input).codes if is_op(call.input, OPS.dequantize.default) else None
        if spec is not None:
            self._dequantized(call.input, spec)
        elif is_op(codes, OPS.quantize.default) or is_op(codes, OPS.decode.default):
            self.fail("its input is rounded to codes")

    def _dequantized_weight(self, node: object, spec: TensorSpec) -> None:
        call = operands(self._is(node, OPS.dequantize.default))
        self._weight(call.codes, call.scale, call.zero_point, spec)
        self._groups(call.group_size, spec)

    def _dequantized(self, node: object, spec: ActivationSpec, operand: str = "") -> None:
        call = operands(self._is(node, OPS.dequantize.default))
        codes = self._decoded(call.codes, spec.tensor)
        self._input(codes, call.scale, call.zero_point, spec, operand)
        self._groups(call.group_size, spec.tensor)

    def _rescaled(self, node: Node) -> Any:
        """The operands of the site's rescale, behind its bias."""
        result: object = node
        if self.site.bias:
            call = operands(self._is(node, OPS.add_bias.default))
            self._bias(call.bias)
            result = call.y
        return operands(self._is(result, OPS.rescale.default))

    def _coded(self, node: Node, weight: TensorSpec, spec: ActivationSpec) -> None:
        found, x = self._rescaled(node), spec.tensor
        grouped = bool(weight.group_size or x.group_size)
        kernel = OPS.grouped_code_gemm.default if grouped else OPS.code_gemm.default
        gemm = operands(self._is(found.sums, kernel))
        corrections = (found.zero_point, found.weight_sum, found.weight_zero_point, found.x_sum)
        if any(each is not None for each in corrections):
            self.fail("it is corrected twice")
        if (gemm.x_grid, gemm.weight_grid) != (x.grid.name, weight.grid.name):
            self.fail(f"products of {gemm.x_grid} by {gemm.weight_grid}")
        if grouped:
            self._groups(gemm.x_group, x)
            self._groups(gemm.weight_group, weight)
        if not (isinstance(gemm.weight, Node) and gemm.weight.op == "get_attr"):
            self.fail("its codes are not read as they are stored")
        inside = gemm.weight_scale if grouped else None
        scale, other = (inside, found.weight_scale)[:: 1 if weight.group_size else -1]
        self._same(other, None)
        self._weight(gemm.weight, scale, gemm.weight_zero_point, weight)
        inside = gemm.x_scale if grouped else None
        scale, other = (inside, found.scale)[:: 1 if x.group_size else -1]
        self._same(other, None)
        self._input(gemm.x_codes, scale, gemm.zero_point, spec)

    def _integer(self, node: Node, weight: TensorSpec, spec: ActivationSpec) -> None:
        found = self._rescaled(node)
        grouped = weight.group_size is not None
        kernel = OPS.grouped_gemm.default if grouped else OPS.int_gemm.default
        gemm = operands(self._is(found.sums, kernel))
        shifted, moved = spec.tensor.grid.has_zero_point, weight.grid.has_zero_point
        if grouped:
            self._weight(gemm.weight_codes, gemm.weight_scale, gemm.weight_zero_point, weight)
            self._groups(gemm.group_size, weight)
            self._own(gemm.weight_sum, "weight_sum", shifted)
            zero_point = gemm.zero_point
            rest = (found.weight_scale, found.zero_point, found.weight_sum, found.x_sum)
            if any(each is not None for each in (*rest, found.weight_zero_point)):
                self.fail("it is corrected twice")
        else:
            self._own(gemm.weight_codes, "weight")
            self._own(found.weight_scale, "weight_scale")
            self._own(found.weight_zero_point, "weight_zero_point", moved)
            self._own(found.weight_sum, "weight_sum", shifted)
            zero_point = found.zero_point
            if moved:
                sums = operands(self._is(found.x_sum, OPS.code_sum.default))
                self._same(sums.codes, gemm.x_codes)
            else:
                self._same(found.x_sum, None)
        self._input(gemm.x_codes, found.scale, zero_point, spec)

    def _product(self, node: Node, grid: Grid) -> None:
        integer, whole = info(self.gm).level == Level.INTEGER, isinstance(grid, IntegerGrid)
        if integer:
            found = operands(self._is(node, OPS.rescale.default))
            kernel = OPS.int_matmul.default if whole else OPS.code_matmul.default
            product = operands(self._is(found.sums, kernel))
            if not whole and (product.left_grid, product.right_grid) != (grid.name, grid.name):
                self.fail(f"products of {product.left_grid} by {product.right_grid}")
            sides = [(product.left_codes, found.scale)]
            right = product.right_codes
            sides += [
                (
                    right,
                    self._column_scale(found.weight_scale, right) if whole else found.weight_scale,
                )
            ]
            if found.zero_point is not None or found.x_sum is not None:
                self.fail("it is corrected by zero points")
        else:
            call = operands(self._is(node, torch.matmul))
            both = [operands(self._is(x, OPS.dequantize.default)) for x in (call.input, call.other)]
            sides = [(each.codes, each.scale) for each in both]
        for operand, (codes, scale) in zip(("left", "right"), sides, strict=True):
            text = self.records[self.site.path, operand].spec
            own = dict(dict(expected_specs(self.scheme, self.site))[operand])[text]
            assert own is not None
            codes = codes if integer else self._decoded(codes, own.tensor)
            self._input(_turned(codes), _turned(scale), None, own, operand)

    def _column_scale(self, scale: object, codes: object) -> object:
        """The static scale behind the columns' own; graphs of earlier versions have it alone."""
        if not is_op(scale, OPS.column_scales.default):
            return scale
        call = operands(scale)
        coded = operands(self._is(_turned(codes), OPS.quantize.default)).x
        self._same(_turned(coded) if _turned(codes) is not codes else coded, call.x)
        return call.scale


def _turned(node: object) -> object:
    """What is transposed, if anything is."""
    return node.args[0] if is_op(node, torch.transpose) else node
