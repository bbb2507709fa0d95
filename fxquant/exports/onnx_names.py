"""How values and nodes of an ONNX model are called: by the paths of their sites."""

from __future__ import annotations

from typing import Any, Final

from torch.fx import GraphModule, Node

from fxquant.exports.onnx_prepare import ONNX_OPS
from fxquant.ir.graph import is_op, tag
from fxquant.ir.legal_forms import OPS

_NAMED: Final = {
    OPS.quantize.default: "codes",
    OPS.int_matmul.default: "sums",
    ONNX_OPS.int_product.default: "sums",
    ONNX_OPS.coded_linear.default: "y",
    OPS.rescale.default: "rescaled",
    OPS.add_bias.default: "y",
}


def ours(gm: GraphModule) -> list[Node]:
    """The nodes that call operators of fxquant, in order."""
    return [node for node in gm.graph.nodes if any(is_op(node, op) for op in _NAMED)]


def code_names(gm: GraphModule) -> dict[str, str]:
    """Name in ONNX of each node that makes codes, by the node's name in the prepared graph."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for node in ours(gm):
        wanted = f"{tag(node).site}/{_NAMED[node.target]}"
        number = 2
        name = wanted
        while name in taken:
            name, number = f"{wanted}_{number}", number + 1
        taken.add(name)
        names[node.name] = name
    return names


def name_sites(model: Any, copy: GraphModule, exported: GraphModule) -> None:
    """Let values and nodes of sites carry the paths; the exporter names them by operator."""
    found = [node.name for node in ours(exported)]
    names = code_names(copy)
    pairs = zip(found, (names[node.name] for node in ours(copy)), strict=True)
    wanted = dict(pairs)
    for node in model.graph:
        for output in node.outputs:
            if output.name in wanted:
                output.name = wanted[output.name]
                node.name = output.name
        for value in node.inputs:
            path, _, own = (value.name if value is not None else "").rpartition(".")
            if own == "codes" and node.op_type in ("MatMulInteger", "DequantizeLinear"):
                node.name = f"{path}/{node.op_type}"
