"""What is known of a graph's residual stream, and which operators commute with its rotation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.ir.graph import LINEAR
from fxquant.ir.operands import op_name, operands
from fxquant.structure.vocabulary import Kind, is_a

SCALE = (Kind.PRODUCT, Kind.QUOTIENT)
_KEEP = (Kind.CAST, Kind.SAME, Kind.RESHAPE)
Values = Mapping[Node, Any]


@dataclass
class Norm:
    """One normalization of the stream, whose result ``node`` the linears ``readers`` take.

    ``call``: the node of a norm that is one module or function; None where it is written out, and
    ``node`` may be the product of ``normed`` and the gain. ``gain`` and ``bias`` [width], None for
    none. ``centred``: the mean is subtracted first, as LayerNorm does.
    """

    node: Node
    normed: Node
    call: Node | None = None
    centred: bool = False
    gain: Tensor | None = None
    bias: Tensor | None = None
    readers: list[Node] = field(default_factory=list)


@dataclass
class ResidualStream:
    """``writers``: linears and lookups whose output is added; ``norms``: what reads through a
    normalization; ``readers``: linears that read the stream itself; ``turned``: (value, the sum
    that adds it) where no weight writes the value, as behind a sublayer's norm; ``deviations``:
    (stream - its mean) of norms that are written out; ``lookup_norm``: a module that normalizes
    the first writer, the token embedding, before anything else reads it."""

    width: int
    writers: list[Node] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)
    turned: list[tuple[Node, Node]] = field(default_factory=list)
    deviations: list[Node] = field(default_factory=list)
    lookup_norm: Node | None = None


def weight_of(node: Node) -> Node | None:
    """The get_attr node of the matrix that a function multiplies by or looks up in, if any."""
    name = op_name(node)
    if name in ("linear", "embedding"):
        found = operands(node).weight
    elif name == "index_select" and len(node.args) == 3 and node.args[1] == 0:
        found = node.args[0]
    else:
        return None
    while isinstance(found, Node) and is_a(found, Kind.CAST):
        found = found.args[0]
    return found if isinstance(found, Node) and found.op == "get_attr" else None


def is_linear_call(gm: GraphModule, node: Node) -> bool:
    """Whether the node multiplies by a weight of the model, as a module or by F.linear."""
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), LINEAR)
    return op_name(node) == "linear" and weight_of(node) is not None


def is_lookup(gm: GraphModule, node: Node) -> bool:
    """Whether the node looks rows up in a table of the model."""
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), nn.Embedding)
    return op_name(node) in ("embedding", "index_select") and weight_of(node) is not None


def whole_norm(gm: GraphModule, node: Node, values: Values) -> Norm | None:
    """The norm over the last dimension that ``node`` is by itself, else None."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if not isinstance(module, nn.LayerNorm | nn.RMSNorm) or len(module.normalized_shape) != 1:
            return None
        bias = getattr(module, "bias", None)
        return Norm(node, node, node, isinstance(module, nn.LayerNorm), module.weight, bias)
    if op_name(node) not in ("layer_norm", "rms_norm"):
        return None
    call = operands(node)
    gain, bias = (
        values.get(each) if isinstance(each, Node) else each
        for each in (call.weight, getattr(call, "bias", None))
    )
    if len(call.normalized_shape) != 1 or any(isinstance(v, Node) for v in call.normalized_shape):
        return None
    return Norm(node, node, node, op_name(node) == "layer_norm", gain, bias)


def keeps(node: Node, source: Node, values: Values) -> bool:
    """A cast, a reshape that leaves the last dimension, or a factor that all channels share."""
    before, after = values.get(source), values.get(node)
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return False
    if before.shape[-1:] != after.shape[-1:]:
        return False
    if is_a(node, *_KEEP):
        return True
    if op_name(node) == "getitem":
        index = node.args[1]
        full = slice(None, None, None)
        return isinstance(index, tuple) and len(index) == before.dim() and index[-1] == full
    return is_a(node, *SCALE) and _shared_factor(node, source, values)


def _shared_factor(node: Node, source: Node, values: Values) -> bool:
    """Whether what multiplies ``source`` is a number, or one for each token."""
    if is_a(node, Kind.QUOTIENT) and node.args[0] is not source:
        return False
    others = [values[a] if isinstance(a, Node) else a for a in node.args if a is not source]
    return len(others) == 1 and all(
        not isinstance(v, Tensor) or v.dim() == 0 or v.shape[-1] == 1 for v in others
    )


def is_square(node: Node) -> bool:
    args = node.args
    if op_name(node) == "square":
        return True
    if is_a(node, Kind.POWER):
        return len(args) > 1 and bool(args[1] == 2)
    return is_a(node, Kind.PRODUCT) and args[0] is args[1]


def is_mean(node: Node) -> bool:
    """A mean over the last dimension, which stays."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim")
    return is_a(node, Kind.MEAN) and dim in (-1, [-1], (-1,)) and keep is True


def uncast(node: Any) -> Any:
    """What ``node`` casts, if it does."""
    while isinstance(node, Node) and is_a(node, Kind.CAST, Kind.SAME):
        node = node.args[0]
    return node
