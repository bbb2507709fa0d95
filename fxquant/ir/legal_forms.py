"""Which node forms are legal at which level, as data, and the verifier that reads it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import fxquant.ir.fused  # noqa: F401  (registers torch.ops.fxquant, with the plain ones)
from fxquant.errors import VerificationError
from fxquant.ir.graph import Level, get_tensor, info, is_op, site_outputs, source_of, tag
from fxquant.ir.leaves import QuantizedParameters
from fxquant.ir.operands import operands
from fxquant.numerics.observers import Observer

OPS: Any = torch.ops.fxquant
ALL = tuple(Level)
CODED, LOWERED, FUSED, INEXACT = ALL[2:], ALL[3:], ALL[4:], ALL[5:]


@dataclass(frozen=True)
class Form:
    """One node form beyond plain float nodes, and the levels where it may stand."""

    name: str
    target: Any
    levels: tuple[Level, ...]
    meaning: str


LEGAL = (
    Form("observer", Observer, (Level.OBSERVED,), "sees its input, has no users"),
    Form("choose_qparams", OPS.choose_qparams.default, CODED, "dynamic scale and zero point"),
    Form("quantize", OPS.quantize.default, CODED, "float to integer codes"),
    Form("choose_scale", OPS.choose_scale.default, CODED, "dynamic scale for another grid"),
    Form("choose_global_scale", OPS.choose_global_scale.default, CODED, "what groups share"),
    Form("choose_group_scales", OPS.choose_group_scales.default, CODED, "scales of groups"),
    Form("decode_scales", OPS.decode_scales.default, CODED, "scales as stored to fp32"),
    Form("quantize_to", OPS.quantize_to.default, CODED, "float to codes of another grid"),
    Form("decode", OPS.decode.default, CODED, "codes of another grid to its numbers"),
    Form("code_gemm", OPS.code_gemm.default, LOWERED, "codes of any grids to sums of products"),
    Form("grouped_code_gemm", OPS.grouped_code_gemm.default, LOWERED, "the same, group by group"),
    Form("unpack_int4", OPS.unpack_int4.default, CODED, "two codes a byte to int8 codes"),
    Form("dequantize", OPS.dequantize.default, CODED, "codes to float; at integer: weights only"),
    Form("code_sum", OPS.code_sum.default, LOWERED, "row sums of codes, for weight zero points"),
    Form("int_matmul", OPS.int_matmul.default, LOWERED, "two activations' codes to exact int32"),
    Form(
        "column_scales", OPS.column_scales.default, LOWERED, "a product's static scale; NaN's way"
    ),
    Form(
        "code_matmul", OPS.code_matmul.default, LOWERED, "the same of another grid, to float sums"
    ),
    Form("attention", OPS.attention.default, ALL, "fused; causal where it has no mask"),
    Form("store_kv", OPS.store_kv.default, ALL, "a cache's storage error, simulated"),
    Form("store_kv_to", OPS.store_kv_to.default, ALL, "the same on another grid"),
    Form("int_gemm", OPS.int_gemm.default, LOWERED, "int8 codes to exact int32"),
    Form("grouped_gemm", OPS.grouped_gemm.default, LOWERED, "int32 per group, rescaled per group"),
    Form("rescale", OPS.rescale.default, LOWERED, "sums to float, rescaled"),
    Form("add_bias", OPS.add_bias.default, LOWERED, "bias in fp32, then one cast"),
    Form("quantize_rows", OPS.quantize_rows.default, FUSED, "dynamic range and codes in one"),
    Form("quantize_static", OPS.quantize_static.default, FUSED, "codes, and the rows with NaN"),
    Form("int_linear", OPS.int_linear.default, FUSED, "int_gemm, rescale and add_bias in one"),
    Form("grouped_int_linear", OPS.grouped_int_linear.default, FUSED, "the same by groups of K"),
    Form("int_product", OPS.int_product.default, FUSED, "int_matmul and rescale in one"),
    Form("dequant_linear", OPS.dequant_linear.default, FUSED, "dequantize and linear in one"),
    Form("code_linear", OPS.code_linear.default, INEXACT, "code_gemm, rescale and add_bias in one"),
)

_MODULES = tuple((form.target, form) for form in LEGAL if isinstance(form.target, type))
_FUNCTIONS = {form.target: form for form in LEGAL if not isinstance(form.target, type)}
STORES = (OPS.store_kv.default, OPS.store_kv_to.default)
_PRODUCTS = (OPS.int_matmul.default, OPS.code_matmul.default)


def verify(gm: GraphModule, after: str) -> None:
    """Check the graph against its level; VerificationError names the pass, site and node."""
    _check_order(gm, after)
    try:
        gm.graph.lint()
    except (RuntimeError, ValueError) as error:
        raise VerificationError(f"after {after}: the graph is not well-formed: {error}") from error
    level = info(gm).level
    for node in gm.graph.nodes:
        form = form_of(gm, node)
        if form is not None and level not in form.levels:
            _fail(after, node, f"{form.name} may not stand at level {level}")
        if is_op(node, OPS.dequantize.default):
            _check_dequantize(gm, node, level, after)
        if is_op(node, OPS.rescale.default):
            _check_rescale(gm, node, after)
        if is_op(node, OPS.int_linear.default) or is_op(node, OPS.code_linear.default):
            call = operands(node)
            rows = _read(gm, node, call.weight, after).shape[0]
            _check_scales(gm, node, call.weight_scale, rows, after)
    _check_sites(gm, after)
    _check_orphans(gm, after)


def observer_nodes(gm: GraphModule) -> list[Node]:
    """The nodes that call an Observer, in graph order."""
    calls = (node for node in gm.graph.nodes if node.op == "call_module")
    return [n for n in calls if isinstance(gm.get_submodule(str(n.target)), Observer)]


def erase_observers(gm: GraphModule) -> None:
    """Take out the observers, and whatever only they read."""
    for node in observer_nodes(gm):
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()


def form_of(gm: GraphModule, node: Node) -> Form | None:
    """The row of LEGAL that describes ``node``, None for a plain float node."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return next((form for kind, form in _MODULES if isinstance(module, kind)), None)
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


def _fail(after: str, node: Node, what: str, site: str | None = None) -> NoReturn:
    site = site or tag(node).site or "no site"
    raise VerificationError(f"after {after}: {site}: node {node.name}: {what}")


def _check_order(gm: GraphModule, after: str) -> None:
    seen: set[Node] = set()
    for node in gm.graph.nodes:
        for used in node.all_input_nodes:
            if used not in seen:
                site = tag(node).site or tag(used).site
                _fail(after, node, f"uses {used.name} before it is computed", site)
        seen.add(node)


def _check_dequantize(gm: GraphModule, node: Node, level: Level, after: str) -> None:
    call = operands(node)
    codes, scale, group_size = call.codes, call.scale, call.group_size
    if level in LOWERED and _is_input(codes):
        _fail(after, node, f"an activation is still dequantized at level {level}")
    attributes = [n for n in (codes, scale) if isinstance(n, Node) and n.op == "get_attr"]
    if len(attributes) < 2:
        return
    shape = tuple(get_tensor(gm, attributes[0]).shape)
    scales = tuple(get_tensor(gm, attributes[1]).shape)
    groups = -(-shape[-1] // group_size) if group_size else 1
    if scales not in ((), (shape[0], groups)):
        _fail(after, node, f"scale of shape {list(scales)} does not fit codes {list(shape)}")


def _is_input(codes: object) -> bool:
    """Whether these are codes, or the numbers of codes, that the graph itself makes."""
    if is_op(codes, OPS.decode.default):
        codes = operands(codes).stored
    made = source_of(codes) if is_op(codes, operator.getitem) else codes
    fused = (OPS.quantize_rows.default, OPS.quantize_static.default)
    return any(is_op(made, op) for op in (OPS.quantize.default, OPS.quantize_to.default, *fused))


def _check_rescale(gm: GraphModule, node: Node, after: str) -> None:
    sums, row = operands(node).sums, operands(node).weight_scale
    if row is None or any(is_op(sums, product) for product in _PRODUCTS):
        return  # grouped_gemm's sums carry the weight scales; a product has two activations'
    column = row.args[0] if isinstance(row, Node) and row.args else row
    _check_scales(gm, node, column, _rows(gm, node, sums, after), after)


def _read(gm: GraphModule, node: Node, operand: object, after: str) -> Tensor:
    """The tensor of the graph that is an operand of ``node``."""
    if not isinstance(operand, Node) or operand.op != "get_attr":
        _fail(after, node, f"{_name(operand)} stands where a tensor of the graph has to")
    return get_tensor(gm, operand)


def _name(operand: object) -> str:
    return f"node {operand.name}" if isinstance(operand, Node) else str(operand)


def _check_scales(gm: GraphModule, node: Node, scale: object, rows: int, after: str) -> None:
    scales = _read(gm, node, scale, after).numel()
    if scales not in (1, rows):
        _fail(after, node, f"{scales} weight scales for {rows} output columns")


def _rows(gm: GraphModule, node: Node, sums: object, after: str) -> int:
    """N of the node int_gemm, code_gemm or grouped_code_gemm whose sums ``node`` reads."""
    if is_op(sums, OPS.int_gemm.default):
        codes = operands(sums).weight_codes
    elif is_op(sums, OPS.code_gemm.default) or is_op(sums, OPS.grouped_code_gemm.default):
        codes = operands(sums).weight
    else:
        _fail(after, node, f"{_name(sums)} stands where a product of codes has to")
    if is_op(codes, OPS.unpack_int4.default):
        codes = operands(codes).packed
    return _read(gm, node, codes, after).shape[0]


def _check_sites(gm: GraphModule, after: str) -> None:
    outputs = {site.path: node for site, node in site_outputs(gm)}
    biased = {tag(node).site for node in gm.graph.nodes if _reads_bias(gm, node)}
    for site in info(gm).sites:
        if site.path not in outputs:
            raise VerificationError(f"after {after}: {site.path}: no node is the site's output")
        if site.bias and site.path not in biased:
            _fail(after, outputs[site.path], "the site's bias is dropped")


def _reads_bias(gm: GraphModule, node: Node) -> bool:
    """Whether the node calls a site's module that has a bias, or reads a bias for its users."""
    if tag(node).site is None:
        return False
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        tensors = (*module.named_parameters(), *module.named_buffers())
        return any(name.rpartition(".")[2] == "bias" for name, _ in tensors)
    return node.op == "get_attr" and str(node.target).endswith(".bias") and bool(node.users)


def _check_orphans(gm: GraphModule, after: str) -> None:
    """Every parameter, buffer and leaf module must be read by some node."""
    used = {str(n.target) for n in gm.graph.nodes if n.op in ("call_module", "get_attr")}
    prefixes = tuple(f"{path}." for path in used)
    tensors = (name for name, _ in (*gm.named_parameters(), *gm.named_buffers()))
    for name in tensors:
        if name not in used and not name.startswith(prefixes):
            owner = gm.get_submodule(name.rpartition(".")[0])
            site = name.rpartition(".")[0] if isinstance(owner, QuantizedParameters) else "no site"
            raise VerificationError(
                f"after {after}: {site}: {name} is left behind, no node reads it"
            )
