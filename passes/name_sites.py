"""name_sites: find every place that a scheme may quantize, and name it by its module path."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from torch.fx import GraphModule

from fxquant.errors import GraphError, NoEffectError, VerificationError
from fxquant.ir.blocks import block_of
from fxquant.ir.coverage import block_matrices
from fxquant.ir.graph import (
    LINEAR,
    GraphInfo,
    LeftInFloat,
    Level,
    Site,
    get_tensor,
    info,
    lowered_already,
    set_tag,
    tag,
    update_info,
)
from fxquant.ir.leaves import Conv1D
from fxquant.ir.operands import op_name
from fxquant.ir.streamed import plain_type
from fxquant.ir.weights import check_chosen
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass
from fxquant.schemes.scheme import Role, Scheme
from fxquant.structure.attention import products_in_float

_SHOWN = 4  # reasons in a message


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
    only_names = True

    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        facts = info(gm)
        if already := lowered_already(facts):
            raise GraphError(already)
        sites: list[Site] = []
        left: list[LeftInFloat] = []
        calls = [node for node in gm.graph.nodes if node.op == "call_module"]
        targets = [str(node.target) for node in calls]
        for node in calls:
            path = str(node.target)
            module = gm.get_submodule(path)
            if not _has_matrix(module):
                continue
            role = _role(path, module, facts)
            reason = _obstacle(path, module, role, targets.count(path))
            if role is None or reason:
                if path not in [entry.path for entry in left]:
                    left.append(LeftInFloat(path, reason))
                continue
            asked = context.scheme.spec_for(path, role).weight
            if asked is not None:
                check_chosen(module, asked, path)
            has_bias = getattr(module, "bias", None) is not None
            sites.append(Site(path, role, weight_shape(module), has_bias))
            set_tag(node, replace(tag(node), site=path, is_output=True))
        left.extend(_of_functions(gm))
        left.extend(products_in_float(gm))
        update_info(gm, sites=tuple(sites), left_in_float=tuple(left))
        _check_covered(gm)
        # Overrides may name sites that a repair makes: they are checked when all are there.
        if not (context.scheme.repairs and context.scheme.overrides):
            _check_effect(gm, context.scheme)
        return gm


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
        if not isinstance(module, LINEAR):
            return f"a {plain_type(module).__name__}, not a linear layer"
        return "a linear layer outside the decoder blocks"
    if calls > 1:
        return f"one module called {calls} times: its inputs need not share a range"
    return ""


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _of_functions(gm: GraphModule) -> list[LeftInFloat]:
    """Weights that a module of its own kind multiplies or looks up by a function."""
    blocks = info(gm).blocks
    found: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        path, value = str(node.target), get_tensor(gm, node)
        functions = [name for user in node.users if (name := _FUNCTIONS.get(user.target))]
        if not isinstance(value, nn.Parameter):
            if functions and "." not in path:  # made while tracing, of weights or of none
                place = next((scope for user in node.users if (scope := tag(user).scope)), path)
                found.setdefault(place, f"a {functions[0]} by a matrix that it computes itself")
            continue
        owner = path.rpartition(".")[0] if path.endswith(".weight") else path
        if functions and (path.endswith(".weight") or value.dim() > 1):
            found.setdefault(owner, f"a {functions[0]} inside a module of the model's own class")
        elif value.dim() > 1 and block_of(path, blocks) is not None:
            shape = "x".join(map(str, value.shape))
            users = ", ".join(dict.fromkeys(op_name(user) for user in node.users))
            found.setdefault(owner, f"a parameter {shape} that goes into {users}, no linear layer")
    return [LeftInFloat(path, reason) for path, reason in found.items()]


_FUNCTIONS: dict[object, str] = {nn.functional.embedding: "lookup", nn.functional.linear: "linear"}


def _check_covered(gm: GraphModule) -> None:
    """VerificationError for a matrix of the blocks that is no site and is not listed either."""
    listed = [entry.path for entry in info(gm).left_in_float]
    for matrix in block_matrices(gm):
        named = any(matrix.path == path or matrix.path.startswith(f"{path}.") for path in listed)
        if matrix.site is None and not named:
            raise VerificationError(
                f"name_sites: {matrix.path} is a matrix of the blocks, but no site, and nothing "
                "says why it stays in float"
            )


def _check_effect(gm: GraphModule, scheme: Scheme) -> None:
    """NoEffectError for a scheme with codes or fp32 products that no site takes."""
    facts = info(gm)
    wanted = scheme.fp32_gemm or any(spec.weight for spec in scheme.specs)
    if scheme.fp32_gemm:
        taken = any(site.role == "linear" for site in facts.sites)
    else:
        specs = (scheme.spec_for(site.path, site.role) for site in facts.sites)
        taken = any(spec.weight for spec in specs)
    if wanted and not taken:
        reasons = "; ".join(
            f"{entry.path}: {entry.reason}"
            for entry in facts.left_in_float[:_SHOWN]
            if block_of(entry.path, facts.blocks) is not None
        )
        raise NoEffectError(
            f"scheme {scheme} quantizes nothing in {facts.model}: no site of it is one that the "
            f"scheme names ({reasons or _named(facts)})"
        )


def _named(facts: GraphInfo) -> str:
    if not any(site.role == "linear" for site in facts.sites):
        return "its decoder blocks hold no linear layer"
    paths = [site.path for site in facts.sites]
    return f"its sites are {', '.join(paths[:_SHOWN])}{', ...' if paths[_SHOWN:] else ''}"
