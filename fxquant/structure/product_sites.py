"""Find attention's two products, QK^T and PV, and lower them where a scheme says attn8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from fxquant.errors import CalibrationError
from fxquant.formats.grid import Grid
from fxquant.formats.integer import IntegerGrid
from fxquant.ir.builder import Builder
from fxquant.ir.graph import Site, SiteRecord, device_of, install, is_op
from fxquant.ir.leaves import QuantizedParameters
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.numerics.observers import HistogramObserver
from fxquant.numerics.static_input import static_input
from fxquant.schemes.named import format8_of
from fxquant.schemes.scheme import Scheme, matches
from fxquant.schemes.specs import ActivationSpec, TensorSpec
from fxquant.schemes.spelling import spell_activation
from fxquant.structure.attention import THROUGH, through
from fxquant.structure.vocabulary import Kind, is_a


def operand_spec(scheme: Scheme, site: Site) -> ActivationSpec | None:
    """How a product's operands become codes; None where the scheme leaves it in float.

    8 bits, symmetric, on the grid that attn8's ``format`` names; static or dynamic, per tensor or
    per token, as the scheme's activations are; dynamic per token under a weight-only scheme, and
    where inputs are in groups. An override without activations, such as "fp", leaves the product in
    float.
    """
    spec, chosen = scheme.spec, False
    for pattern, override in scheme.overrides:
        if matches(pattern, site.path, site.role):
            spec, chosen = override, True
    if spec.weight is None or (chosen and spec.activation is None):
        return None
    grid = format8_of(dict(scheme.repairs).get("attn8", ()))
    if spec.activation is None:
        return ActivationSpec(TensorSpec(grid, granularity="token"))
    granularity = spec.activation.tensor.granularity
    if granularity == "group":  # of a head's channels there are too few for groups
        granularity = "token"
    return ActivationSpec(TensorSpec(grid, granularity=granularity), spec.activation.estimator)


def observed(builder: Builder, site: Site, node: Node, mask: Node) -> None:
    """Put an observer on both operands of the product, tokens first as the mask has them."""
    for side, operand, dim in _sides(node):
        path = observer_path(site, side)
        install(builder.gm, path, HistogramObserver(site.path).to(device_of(builder.gm)))
        tokens_first = builder.call(torch.transpose, operand, 1, dim, name=f"{side}_tokens")
        builder.module(path, tokens_first, mask)


def observer_path(site: Site, side: str = "") -> str:
    """Where the observer of a site's input, or of one of its two operands, is installed."""
    return f"fxquant_observers.{site.path.replace('.', '_')}{f'_{side}' if side else ''}"


def _sides(node: Node) -> Iterator[tuple[str, Node, int]]:
    """Each operand with the dimension that its tokens lie along."""
    product = operands(node)
    yield "left", product.input, 2
    yield "right", product.other, 3 if is_transposed(node) else 2


def operand_specs(node: Node, spec: ActivationSpec) -> tuple[ActivationSpec, ActivationSpec]:
    """The product's left and right operand: V has one scale, since its tokens are summed over."""
    return spec, spec if is_transposed(node) else whole_operand(spec)


def whole_operand(spec: ActivationSpec) -> ActivationSpec:
    """The same in one scale."""
    return replace(spec, tensor=replace(spec.tensor, granularity="tensor"))


def is_transposed(node: Node) -> bool:
    """Whether the right operand's tokens are its columns, k^T of QK^T: the left is no softmax."""
    operand = operands(node).input
    while isinstance(operand, Node) and is_a(operand, *THROUGH):
        if is_a(operand, Kind.SOFTMAX):
            return False
        operand = through(operand)
    return True


def lower_product(
    gm: GraphModule, site: Site, node: Node, spec: ActivationSpec
) -> list[SiteRecord]:
    """matmul(a, b) becomes matmul(dequantize(quantize(a)), dequantize(quantize(b))).

    A scale can leave the sum over K only where it is constant along K: per token on both sides of
    QK^T, but on P's side alone of PV, where V has one scale.
    """
    builder = Builder(gm, "quantize", site.path, (node,))
    parameters = QuantizedParameters({})
    install(gm, site.path, parameters)
    operands: list[Node] = []
    records: list[SiteRecord] = []
    specs = operand_specs(node, spec)
    with gm.graph.inserting_before(node):
        for own, (side, operand, dim) in zip(specs, _sides(node), strict=True):
            turned = dim == 3  # k^T: its tokens are columns
            grain, found = own.tensor.granularity, None
            x = builder.call(torch.transpose, operand, -2, -1) if turned else operand
            if spec.dynamic:
                scale = _chosen(builder, x, own.tensor, side)
            else:
                buffers, found = static_input(operand_observer(gm, site, side), own)
                parameters.register_buffer(f"{side}_scale", buffers["input_scale"])
                scale = builder.attribute(f"{side}_scale")
            facts = {} if found is None else vars(found)
            records.append(
                SiteRecord(site.path, spell_activation(own), None, operand=side, **facts)
            )
            codes = _codes(builder, x, scale, own.tensor.grid, f"{side}_q")
            if turned:
                codes = builder.call(torch.transpose, codes, -2, -1)
                if grain == "token":
                    scale = builder.call(torch.transpose, scale, -2, -1)
            codes = _decoded(builder, codes, own.tensor.grid, f"{side}_v")
            operands.append(
                builder.call(
                    OPS.dequantize.default, codes, scale, None, 0, operand, name=f"{side}_dq"
                )
            )
        y = builder.call(torch.matmul, *operands, name="y", is_output=True)
    builder.replace(node, y)
    if not list(parameters.buffers()):
        gm.delete_submodule(site.path)
    return records


def _chosen(builder: Builder, x: Node, spec: TensorSpec, side: str) -> Node:
    """The node of a dynamic scale."""
    grid, grain = spec.grid, spec.granularity
    if not isinstance(grid, IntegerGrid):
        return builder.call(OPS.choose_scale.default, x, grain, grid.name, name=f"{side}_scale")
    chosen = builder.call(
        OPS.choose_qparams.default, x, grain, True, *grid.codes, name=f"{side}_qparams"
    )
    return builder.item(chosen, 0, f"{side}_scale")


def _codes(builder: Builder, x: Node, scale: Node, grid: Grid, name: str) -> Node:
    if not isinstance(grid, IntegerGrid):
        return builder.call(OPS.quantize_to.default, x, scale, grid.name, 0, name=name)
    return builder.call(OPS.quantize.default, x, scale, None, *grid.codes, grid.storage, name=name)


def _decoded(builder: Builder, codes: Node, grid: Grid, name: str) -> Node:
    """The numbers of the codes; of integers these are the codes themselves."""
    if isinstance(grid, IntegerGrid):
        return codes
    return builder.call(OPS.decode.default, codes, grid.name, 0, name=name)


def operand_observer(gm: GraphModule, site: Site, side: str) -> HistogramObserver:
    """The observer that ``observed`` put on the operand; CalibrationError if there is none."""
    try:
        observer = gm.get_submodule(observer_path(site, side))
    except AttributeError:
        observer = None
    if not isinstance(observer, HistogramObserver):
        raise CalibrationError(
            f"{site.path}: its range is static, but its {side} operand was not observed; run "
            "Observe and Calibrate before Quantize"
        )
    return observer


def integerize_product(gm: GraphModule, site: Site, node: Node) -> bool:
    """matmul(dequantize(a), dequantize(b)) becomes rescale(int_matmul(a, b)); False if it is not.

    On another grid it is code_matmul. Exact: the scales are constant along K, so they leave the
    sum.
    """
    if not is_op(node, torch.matmul) or site.role != "matmul":
        return False
    left, right = operands(node).input, operands(node).other
    if not (is_op(left, OPS.dequantize.default) and is_op(right, OPS.dequantize.default)):
        return False
    builder = Builder(gm, "integerize", site.path, (left, right, node))
    a, b = operands(left), operands(right)
    with gm.graph.inserting_before(node):
        right_scale = b.scale
        if is_op(a.codes, OPS.decode.default):
            x, y = operands(a.codes), operands(b.codes)
            grids = (x.grid, y.grid)
            acc = builder.call(OPS.code_matmul.default, x.stored, y.stored, *grids, name="acc")
        else:
            acc = builder.call(OPS.int_matmul.default, a.codes, b.codes, name="acc")
            if right_scale.op == "get_attr":  # a dynamic scale is NaN where its operand is
                right_scale = builder.call(
                    OPS.column_scales.default, b.scale, b.like, name="right_scales"
                )
        corrections = (None, None, None, None)
        y = builder.call(
            OPS.rescale.default,
            acc,
            a.scale,
            right_scale,
            *corrections,
            a.like,
            name="y",
            is_output=True,
        )
    builder.replace(node, y)
    return True
