"""What the passes that rotate share: new weights in place of old ones, and what may be rotated."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import ModelError
from fxquant.ir.graph import get_tensor, install, linear_parameters, tag
from fxquant.ir.leaves import CodedLinear, OnlineRotation
from fxquant.ir.operands import operands
from fxquant.ir.weights import with_parameters
from fxquant.numerics.hadamard import orthogonal_factors
from fxquant.structure.stream import ResidualStream, weight_of
from fxquant.structure.vocabulary import Kind, is_a

CONTAINER = "fxquant_rotations"


def weights_of(gm: GraphModule, node: Node) -> tuple[Tensor, Tensor | None]:
    """Weight [N, K] and bias [N] of the linear that ``node`` calls, by a module or by F.linear."""
    if node.op == "call_module":
        return linear_parameters(gm.get_submodule(str(node.target)))
    bias = operands(node).bias
    weight = get_tensor(gm, _weight_node(node)).detach()
    return weight, get_tensor(gm, bias).detach() if isinstance(bias, Node) else None


def put_linear(gm: GraphModule, node: Node, weight: Tensor, bias: Tensor | None) -> None:
    """Give the linear that ``node`` calls a weight [N, K] and a bias, in its weight's dtype."""
    dtype = weights_of(gm, node)[0].dtype
    if node.op != "call_module":
        put_table(gm, node, weight.to(dtype))
        if bias is not None:
            _put_bias(gm, node, bias.to(dtype))
        return
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    install(gm, str(node.target), linear)


def table_of(gm: GraphModule, node: Node) -> Tensor:
    """What ``node`` looks up in, by a module or by a function: [rows, width]."""
    if node.op == "call_module":
        return gm.get_submodule(str(node.target)).get_parameter("weight").detach()
    return get_tensor(gm, _weight_node(node)).detach()


def put_table(gm: GraphModule, node: Node, table: Tensor) -> None:
    """Let ``node`` look up in ``table``, or, a function, multiply by it."""
    if node.op == "call_module":
        owner, name = str(node.target), "weight"
    else:
        owner, _, name = str(_weight_node(node).target).rpartition(".")
    install(gm, owner, with_parameters(gm.get_submodule(owner), **{name: table}))


def _put_bias(gm: GraphModule, node: Node, bias: Tensor) -> None:
    found = operands(node).bias
    if not isinstance(found, Node):
        table = _weight_node(node)
        owner = str(table.target).rpartition(".")[0]
        with gm.graph.inserting_before(node):
            found = gm.graph.get_attr(f"{owner}.bias")
        found.meta = dict(table.meta)
        node.args = (*node.args[:1], operands(node).weight, found)
        node.kwargs = {}
    owner, _, name = str(found.target).rpartition(".")
    install(gm, owner, with_parameters(gm.get_submodule(owner), **{name: bias}))


def _weight_node(node: Node) -> Node:
    found = weight_of(node)
    assert found is not None
    return found


def check_rotatable(gm: GraphModule, stream: ResidualStream) -> None:
    """Raise ModelError where a leaf is shared, where codes were chosen, or where norms differ."""
    for node in (*stream.writers, *readers_of(stream)):
        leaf = node if node.op == "call_module" else _weight_node(node)
        path = str(leaf.target)
        if leaf.op == "get_attr" and "." not in path:
            raise ModelError(
                f"rotate: {tag(node).scope or node.name} multiplies by what it computes itself, "
                "not by a weight; it is not rotated"
            )
        if _uses(gm, leaf) > 1:
            raise ModelError(f"rotate: {path} is used more than once; it is not rotated")
        if node.op == "call_module" and isinstance(gm.get_submodule(path), CodedLinear):
            raise ModelError(f"rotate: {path}: its codes are chosen already; rotate before that")
    norms = [norm.call for norm in stream.norms if norm.call is not None]
    norms += [] if stream.lookup_norm is None else [stream.lookup_norm]
    for call in norms:
        ours = [each.target for each in norms].count(call.target)
        if call.op == "call_module" and _uses(gm, call) != ours:
            raise ModelError(f"rotate: {call.target} also normalizes what is not the stream")
    centred(stream)


def _uses(gm: GraphModule, leaf: Node) -> int:
    """How often the module is called, or the tensor read, that ``leaf`` names."""
    found = [node for node in gm.graph.nodes if (node.op, node.target) == (leaf.op, leaf.target)]
    if leaf.op == "call_module":
        return len(found)
    return sum(not is_a(user, Kind.SHAPE) for node in found for user in node.users)


def readers_of(stream: ResidualStream) -> list[Node]:
    """The linears that read the stream, itself or through a norm."""
    return [*stream.readers, *(reader for norm in stream.norms for reader in norm.readers)]


def centred(stream: ResidualStream) -> bool:
    """Whether the norms subtract the mean; ModelError where some do and some do not."""
    means = {norm.centred for norm in stream.norms}
    if len(means) > 1 or (True in means and stream.readers):
        raise ModelError(
            "rotate: some readers of the residual stream subtract its mean and some do not; the "
            "mean cannot be moved into what writes to it"
        )
    return means == {True}


def online_rotation(gm: GraphModule, width: int, seed: int, like: Tensor) -> str:
    """The path of the OnlineRotation of this width and seed, one for all that use it."""
    path = f"{CONTAINER}.width{width}_seed{seed}"
    if path not in dict(gm.named_modules()):
        factors = (each.to(like.device, like.dtype) for each in orthogonal_factors(width, seed)[:2])
        install(gm, path, OnlineRotation(*factors))
    return path


@torch.no_grad()
def fold_lookup_norm(gm: GraphModule, stream: ResidualStream) -> None:
    """The norm that alone reads the token embedding goes into its table.

    before:  h = layer_norm(embedding(ids))        as Bloom has it
    after:   h = embedding(ids)                    its rows normalized
    """
    norm, lookup = stream.lookup_norm, stream.writers[0]
    if norm is not None:
        table = table_of(gm, lookup)
        put_table(gm, lookup, gm.get_submodule(str(norm.target))(table).to(table.dtype))
        norm.replace_all_uses_with(lookup)
        gm.graph.erase_node(norm)
