"""What the passes that rotate share: new linears in place of old ones, and what may be rotated."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import ModelError
from fxquant.ir.graph import install, linear_parameters
from fxquant.ir.leaves import CodedLinear
from fxquant.structure.residual import ResidualStream


def put_linear(gm: GraphModule, node: Node, weight: Tensor, bias: Tensor | None) -> None:
    """Install a linear of ``weight`` [N, K] in the dtype of the one that ``node`` calls."""
    old, _ = linear_parameters(gm.get_submodule(str(node.target)))
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(old.dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(old.dtype), requires_grad=False)
    install(gm, str(node.target), linear)


def check_rotatable(gm: GraphModule, stream: ResidualStream) -> None:
    """Raise ModelError where a leaf is shared, where codes were chosen, or where norms differ."""
    calls = [str(node.target) for node in gm.graph.nodes if node.op in ("call_module", "get_attr")]
    for node in (*stream.writers, *readers_of(stream)):
        path = str(node.target) if node.op == "call_module" else str(table_of(node).target)
        if calls.count(path) > 1:
            raise ModelError(f"rotate: {path} is used more than once; it is not rotated")
        if node.op == "call_module" and isinstance(gm.get_submodule(path), CodedLinear):
            raise ModelError(f"rotate: {path}: its codes are chosen already; rotate before that")
    centred(stream)


def readers_of(stream: ResidualStream) -> list[Node]:
    """The linears that read the stream, itself or through a norm."""
    return [*stream.readers, *(reader for norm in stream.norms for reader in norm.readers)]


def centred(stream: ResidualStream) -> bool:
    """Whether the norms subtract the mean; ModelError where some do and some do not."""
    means = {norm.layer_norm is not None for norm in stream.norms}
    if len(means) > 1 or (True in means and stream.readers):
        raise ModelError(
            "rotate: some readers of the residual stream subtract its mean and some do not; the "
            "mean cannot be moved into what writes to it"
        )
    return means == {True}


def table_of(node: Node) -> Node:
    """The weight of a functional embedding."""
    operand = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    assert isinstance(operand, Node)
    return operand
