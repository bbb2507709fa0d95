"""name_sites: find every place that a scheme may quantize, and name it by its module path."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from torch.fx import GraphModule

from fxquant.errors import GraphError
from fxquant.ir.blocks import block_of
from fxquant.ir.graph import (
    LINEAR,
    GraphInfo,
    LeftInFloat,
    Level,
    Site,
    info,
    set_tag,
    tag,
    update_info,
)
from fxquant.ir.leaves import Conv1D
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass
from fxquant.schemes.scheme import Role
from fxquant.structure.attention import products_in_float


@dataclass(frozen=True)
class NameSites(Pass):
    """Tag linears in the decoder blocks, the head and the token embedding as sites.

    before:  y = call_module layers.0.fc1(x)
    after:   y = call_module layers.0.fc1(x)        # site layers.0.fc1

    Found by structure: a linear layer below one of the model's repeated blocks. What multiplies
    or looks up weights elsewhere is listed as left in float, with the reason.
    """

    name = "name_sites"
    requires = (Level.FLOAT,)
    effect = "exact"

    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        facts = info(gm)
        _check_sites(facts)
        sites: list[Site] = []
        left: list[LeftInFloat] = []
        calls = [node for node in gm.graph.nodes if node.op == "call_module"]
        targets = [str(node.target) for node in calls]
        for node in calls:
            path = str(node.target)
            module = gm.get_submodule(path)
            if not isinstance(module, (*LINEAR, nn.Embedding, nn.Conv1d)):
                continue
            role = _role(path, module, facts)
            reason = _obstacle(path, module, role, targets.count(path))
            if role is None or reason:
                if path not in [entry.path for entry in left]:
                    left.append(LeftInFloat(path, reason))
                continue
            has_bias = getattr(module, "bias", None) is not None
            sites.append(Site(path, role, weight_shape(module), has_bias))
            set_tag(node, replace(tag(node), site=path, is_output=True))
        left.extend(_functional_weights(gm))
        left.extend(products_in_float(gm))
        update_info(gm, sites=tuple(sites), left_in_float=tuple(left))
        return gm


def _check_sites(facts: GraphInfo) -> None:
    """GraphError where earlier passes left sites that could not be found again."""
    if facts.scheme == "fp32-gemm":
        raise GraphError(
            "the graph's linears compute in fp32 already (scheme fp32-gemm): start from the model "
            "or from fxquant.trace(model) for another scheme"
        )
    if any(site.role == "matmul" for site in facts.sites):
        raise GraphError(
            "attention's products are sites of this graph already (a repair such as attn8 ran): "
            "start from the model or from fxquant.trace(model), and name the repair in the scheme"
        )


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """[N, K] as F.linear has it (Conv1D stores [K, N]; an embedding is [rows, width])."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _role(path: str, module: nn.Module, facts: GraphInfo) -> Role | None:
    if path == facts.head:
        return "head"
    if path == facts.embeddings and isinstance(module, nn.Embedding):
        return "embeddings"
    inside = block_of(path, facts.blocks) is not None
    return "linear" if inside and isinstance(module, LINEAR) else None


def _obstacle(path: str, module: nn.Module, role: Role | None, calls: int) -> str:
    if role is None:
        if isinstance(module, nn.Embedding):
            return "an embedding that does not look up tokens"
        if isinstance(module, nn.Conv1d):
            return "a convolution, not a linear layer"
        return "a linear layer outside the decoder blocks"
    if calls > 1:
        return f"one module called {calls} times: its inputs need not share a range"
    return ""


def _functional_weights(gm: GraphModule) -> list[LeftInFloat]:
    """Weights that a module of its own kind multiplies or looks up by a function."""
    functions = {nn.functional.embedding: "lookup", nn.functional.linear: "linear"}
    return [
        LeftInFloat(
            str(operand.target).rpartition(".")[0],
            f"a {functions[node.target]} inside a module of the model's own class",
        )
        for node in gm.graph.nodes
        if node.op == "call_function" and node.target in functions
        for operand in node.all_input_nodes
        if operand.op == "get_attr" and str(operand.target).endswith("weight")
    ]
