"""Where a scale of an activation's channels can come from: the walk from an input to its producer.

A per-channel scale at a linear's input can be had from further up as long as every operator on the
way either moves channels about or is homogeneous in them: f(x / s) = f(x) / s for s > 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.ir.graph import LINEAR, get_tensor, linear_parameters, tag
from fxquant.ir.operands import op_name, operands
from fxquant.structure.outcome import Blocked
from fxquant.structure.vocabulary import MOVES, Kind, is_a

ProducerKind = Literal["norm", "vector", "rows"]

# Homogeneous in their first operand, whose channels they at most move about.
_HOMOGENEOUS = (*MOVES, Kind.CAST, Kind.RELU, Kind.NEGATION)
_CALLED = {
    "silu": "SiLU",
    "gelu": "GELU",
    "tanh": "tanh",
    "sigmoid": "a sigmoid",
    "add": "a sum (the residual stream)",
    "iadd": "a sum (the residual stream)",
    "embedding": "the embedding",
    "pow": "a power",
}


@dataclass(frozen=True)
class Producer:
    """What can take a scale of its output's last dimension of ``channels``.

    ``kind``: "norm", a LayerNorm or RMSNorm module; "vector", a multiplication by the parameter
    ``path`` plus ``offset`` (1 in Gemma), as traced RMSNorms end; "rows", of a previous linear.
    ``reader`` is the get_attr node of a vector.
    """

    kind: ProducerKind
    node: Node
    path: str
    channels: int
    offset: float = 0.0
    reader: Node | None = None

    @property
    def start(self) -> Node:
        """The first node whose value a scale changes: a vector is read before it multiplies."""
        return self.reader or self.node


@dataclass(frozen=True)
class ScalePath:
    """``through`` maps each node behind the producer to the operand that carries the channels."""

    producer: Producer
    through: Mapping[Node, Node]

    @property
    def nodes(self) -> frozenset[Node]:
        return frozenset((self.producer.node, *self.through))


def find_path(gm: GraphModule, source: Node) -> ScalePath | Blocked:
    """The way from ``source``, a linear's input, up to the nearest producer."""
    if source.op == "call_module":
        return _module(gm, source)
    if is_a(source, *_HOMOGENEOUS):
        return _extend(gm, source, (source.args[0],))
    if is_a(source, Kind.PRODUCT):
        return _product(gm, source)
    if is_a(source, Kind.QUOTIENT) and _is_scalar(gm, source.args[1]):
        return _extend(gm, source, (source.args[0],))
    value = attention_value(source)
    if value is not None:
        return _extend(gm, source, (value,))
    name = op_name(source)
    what = _CALLED.get(name, name or {"placeholder": "the model's inputs"}.get(source.op, "data"))
    return Blocked(f"its input comes from {what}", (source,))


def attention_value(node: Node) -> Node | None:
    """V, where ``node`` is an attention's product of probabilities and values; else None."""
    if is_a(node, Kind.ATTENTION):
        attention = operands(node)
        shares_heads = getattr(attention, "enable_gqa", False)
        value = None if shares_heads else attention.value
    elif is_a(node, Kind.MATMUL) and len(node.args) == 2 and is_softmax(node.args[0]):
        value = node.args[1]
    else:
        return None
    return value if isinstance(value, Node) else None


def is_softmax(node: object) -> bool:
    """Whether the node is a softmax, perhaps cast or reshaped."""
    while isinstance(node, Node) and is_a(node, Kind.CAST, *MOVES):
        node = node.args[0]
    return isinstance(node, Node) and is_a(node, Kind.SOFTMAX)


def gain(gm: GraphModule, node: object) -> tuple[str, float] | None:
    """(path of a vector parameter, offset) if ``node`` is it, cast or with a number added."""
    offset = 0.0
    while isinstance(node, Node) and node.op != "get_attr":
        if is_a(node, Kind.SUM) and len(node.args) == 2:
            numbers = [arg for arg in node.args if isinstance(arg, (int, float))]
            if len(numbers) != 1:
                return None
            offset += numbers[0]
            node = next(arg for arg in node.args if isinstance(arg, Node))
        elif is_a(node, Kind.CAST):
            node = node.args[0]
        else:
            return None
    if not isinstance(node, Node):
        return None
    tensor = get_tensor(gm, node)
    is_vector = tensor.dim() == 1 and tensor.numel() > 1 and isinstance(tensor, nn.Parameter)
    return (str(node.target), offset) if is_vector else None


def _module(gm: GraphModule, node: Node) -> ScalePath | Blocked:
    path = str(node.target)
    module = gm.get_submodule(path)
    if isinstance(module, nn.ReLU):
        return _extend(gm, node, (node.args[0],))
    calls = sum(n.op == "call_module" and n.target == node.target for n in gm.graph.nodes)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, *LINEAR)) and calls > 1:
        return Blocked(f"{path}, where its input comes from, is called {calls} times", (node,))
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        if len(module.normalized_shape) > 1:
            return Blocked(f"{path} normalizes more than the last dimension", (node,))
        return ScalePath(Producer("norm", node, path, module.normalized_shape[0]), {})
    if isinstance(module, LINEAR):
        if not tag(node).is_output:
            return Blocked(f"its input comes from {path}, which is no site", (node,))
        rows = linear_parameters(module)[0].shape[0]
        return ScalePath(Producer("rows", node, path, rows), {})
    name = type(module).__name__
    what = "the embedding" if isinstance(module, nn.Embedding) else name
    return Blocked(f"its input comes from {what}", (node,))


def _product(gm: GraphModule, node: Node) -> ScalePath | Blocked:
    operands = tuple(node.args[:2])
    nodes = [operand for operand in operands if isinstance(operand, Node)]
    if len(nodes) == 2 and nodes[0] is nodes[1]:
        return Blocked("its input comes from a square", (node,))
    for operand in operands:
        found = gain(gm, operand)
        if found is not None:
            path, offset = found
            readers = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == path]
            if len(readers) > 1 or len(readers[0].users) > 1:
                return Blocked(f"its gain {path} is read in other places too", (node,))
            channels = get_tensor(gm, readers[0]).numel()
            return ScalePath(Producer("vector", node, path, channels, offset, readers[0]), {})
    carriers = tuple(operand for operand in nodes if not _is_scalar(gm, operand))
    return _extend(gm, node, carriers)


def _is_scalar(gm: GraphModule, operand: Any) -> bool:
    if isinstance(operand, (int, float)):
        return True
    is_leaf = isinstance(operand, Node) and operand.op == "get_attr"
    return is_leaf and get_tensor(gm, operand).numel() == 1


def _extend(gm: GraphModule, node: Node, operands: tuple[Any, ...]) -> ScalePath | Blocked:
    """The first operand from which a producer is reached carries the channels."""
    blocked: ScalePath | Blocked = Blocked(f"its input comes from {op_name(node)}", (node,))
    for operand in operands:
        found = find_path(gm, operand)
        if isinstance(found, ScalePath):
            return ScalePath(found.producer, {**found.through, node: operand})
        blocked = found
    return blocked
