"""How values and nodes of an ONNX model are called: by the paths of their sites."""

from __future__ import annotations

import ast
import operator
from collections import Counter
from typing import Any, Final

from torch.fx import GraphModule, Node

from fxquant.exports.onnx_prepare import ONNX_OPS
from fxquant.ir.graph import is_op, site_outputs, tag
from fxquant.ir.legal_forms import OPS

ZERO_POINT: Final = "zero_point"
_NAMED: Final = {
    OPS.quantize.default: "codes",
    OPS.int_matmul.default: "sums",
    ONNX_OPS.int_product.default: "sums",
    ONNX_OPS.coded_linear.default: "y",
    OPS.rescale.default: "rescaled",
    OPS.add_bias.default: "y",
}
_SCOPES: Final = "pkg.torch.onnx.name_scopes"  # paths of modules, the node's own name last


def kind_of(node: Node) -> str:
    """What a node's value is called behind its site's path, "" for one that is not named."""
    if node.target is operator.getitem:
        pair, index = node.args
        dynamic = isinstance(pair, Node) and is_op(pair, OPS.choose_qparams.default)
        return ZERO_POINT if dynamic and index == 1 and node.users else ""
    return next((name for op, name in _NAMED.items() if is_op(node, op)), "")


def value_names(gm: GraphModule) -> dict[str, str]:
    """Name in ONNX of what operators of fxquant make, by the node's name in the prepared graph."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for node in gm.graph.nodes:
        if not kind_of(node):
            continue
        wanted = f"{tag(node).site}/{kind_of(node)}"
        number = 2
        name = wanted
        while name in taken:
            name, number = f"{wanted}_{number}", number + 1
        taken.add(name)
        names[node.name] = name
    return names


def output_names(copy: GraphModule) -> list[str]:
    """Name in ONNX of each site's output, in order, "" for one that has none: of what a module
    makes in float, only where it is called once."""
    known = value_names(copy)
    calls = Counter(site.path for site, _ in site_outputs(copy))
    return [
        known.get(node.name, f"{site.path}/y" if calls[site.path] == 1 else "")
        for site, node in site_outputs(copy)
    ]


def name_sites(model: Any, copy: GraphModule, exported: GraphModule) -> None:
    """Let values and nodes of sites carry the paths; the exporter names them by operator."""
    known = value_names(copy)
    found = [node.name for node in exported.graph.nodes if kind_of(node)]
    wanted = dict(zip(found, known.values(), strict=True))
    in_float = set(output_names(copy)) - set(known.values())
    last: dict[str, Any] = {}
    for node in model.graph:
        for output in node.outputs:
            if output.name in wanted:
                output.name = wanted[output.name]
                node.name = output.name
        for value in node.inputs:
            path, _, own = (value.name if value is not None else "").rpartition(".")
            if own == "codes" and node.op_type in ("MatMulInteger", "DequantizeLinear"):
                node.name = f"{path}/{node.op_type}"
        if (name := f"{_module(node)}/y") in in_float:
            last[name] = node
    for name, node in last.items():
        if not any(output.is_graph_output() for output in node.outputs):
            node.name = node.outputs[0].name = name


def _module(node: Any) -> str:
    """Path of the innermost module whose call the node is a part of, "" where it is none."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return scopes[-2].partition(".")[2] if len(scopes) > 1 else ""
