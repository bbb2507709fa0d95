"""The residual stream of a graph, found by dataflow: who writes to it, who reads it, what is odd.

Every value is classed by what an orthogonal change of basis of the stream does to it. The token
embedding starts the stream; sums, casts, reshapes and scalar factors keep it; a mean of squares
does not change; a linear ends it; what is added to it is traced back to what wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import ModelError
from fxquant.ir.blocks import block_of
from fxquant.ir.graph import LINEAR, device_of, info
from fxquant.ir.operands import op_name
from fxquant.run.execution import Executor
from fxquant.run.probe import Probe
from fxquant.structure.vocabulary import Kind, is_a

_SCALE = (Kind.PRODUCT, Kind.QUOTIENT)
_KEEP = (Kind.CAST, Kind.SAME, Kind.RESHAPE)
_SCALAR = (*_SCALE, Kind.SUM, Kind.ROOT, Kind.POWER)


@dataclass
class Norm:
    """One normalization of the stream, whose result ``node`` the linears ``readers`` take.

    ``layer_norm`` is a LayerNorm's node; None for an RMSNorm written out, where ``node`` may be
    the product of ``normed`` and a vector ``gain`` [width].
    """

    node: Node
    layer_norm: Node | None
    normed: Node
    gain: Tensor | None = None
    readers: list[Node] = field(default_factory=list)


@dataclass
class ResidualStream:
    """``writers``: linears and embeddings whose output is added; ``norms``: what reads through a
    normalization; ``readers``: linears that read the stream itself."""

    width: int
    writers: list[Node] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)


def residual_stream(gm: GraphModule) -> ResidualStream:
    """The stream of ``gm``; ModelError, with the node and the reason, where it has no rotation."""
    return _Analysis(gm).run()


class _Analysis:
    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.values = _probe_values(gm)
        self.kind: dict[Node, str] = {}  # stream, normed, gained, squares, scalar
        self.norm_of: dict[Node, Norm] = {}

    def run(self) -> ResidualStream:
        start = next(
            (
                n
                for n in self.gm.graph.nodes
                if n.op == "call_module" and n.target == info(self.gm).embeddings
            ),
            None,
        )
        if start is None:
            raise ModelError(
                f"rotate: {info(self.gm).model} looks tokens up otherwise than by an embedding "
                "module"
            )
        self.stream = ResidualStream(int(self.values[start].shape[-1]), [start])
        self.kind[start] = "stream"
        for node in self.gm.graph.nodes:
            if node is not start and node.op != "output":
                self._visit(node)
            if node.op == "output" and any(arg in self.kind for arg in node.all_input_nodes):
                self._refuse(node, "the output is the residual stream itself, no head reads it")
        self._check_blocks()
        return self.stream

    def _refuse(self, node: Node, why: str) -> None:
        raise ModelError(
            f"rotate: {info(self.gm).model}: {_name(node)}: {why}; its residual stream cannot be "
            "rotated without changing the function"
        )

    def _check_blocks(self) -> None:
        readers = [r for norm in self.stream.norms for r in norm.readers] + self.stream.readers
        blocks = info(self.gm).blocks
        reading = {block_of(str(reader.target), blocks) for reader in readers}
        for block in blocks:
            if block not in reading:
                raise ModelError(
                    f"rotate: {info(self.gm).model}: {block} does not read the stream that the "
                    "token embedding starts through a norm (an embedding of another width is "
                    "projected first, or a norm follows it); such a model is not rotated"
                )

    def _visit(self, node: Node) -> None:
        # type_as asks its second operand for the dtype only.
        read = node.args[:1] if op_name(node) == "type_as" else node.all_input_nodes
        operands = [n for n in read if isinstance(n, Node) and n in self.kind]
        if not operands or node in self.kind:
            return
        kinds = {self.kind[n] for n in operands}
        if is_a(node, Kind.SHAPE):
            return
        if node.op == "call_module":
            self._visit_module(node, operands[0])
        elif (kind := self._invariant(node, operands, kinds)) is not None:
            self.kind[node] = kind
        elif kinds == {"stream", "scalar"} and is_a(node, Kind.PRODUCT):
            self._start_norm(node)
        elif kinds == {"normed"} and is_a(node, Kind.PRODUCT) and self._gain(node) is not None:
            norm = self.norm_of[operands[0]]
            norm.node, norm.normed, norm.gain = node, operands[0], self._gain(node)
            self._follow(node, "gained", norm)
        elif len(kinds) == 1 and self._keeps(node, operands[0]):
            self.kind[node] = self.kind[operands[0]]
            if operands[0] in self.norm_of:
                self.norm_of[node] = self.norm_of[operands[0]]
        elif kinds == {"stream"} and is_a(node, Kind.SUM):
            self._add(node)
        else:
            what = " and ".join(sorted(kinds))
            self._refuse(node, f"reads the {what} in a way that does not commute with a rotation")

    def _invariant(self, node: Node, operands: list[Node], kinds: set[str]) -> str | None:
        """ "squares" of the stream, or a "scalar": their mean and what is computed from it."""
        if kinds == {"stream"} and self._is_square(node):
            return "squares"
        if kinds == {"squares"} and is_a(node, Kind.MEAN) and _last_dim(node):
            return "scalar"
        return "scalar" if kinds == {"scalar"} and self._is_scalar(node, operands) else None

    def _start_norm(self, node: Node) -> None:
        norm = Norm(node, None, node)
        self.stream.norms.append(norm)
        self._follow(node, "normed", norm)

    def _follow(self, node: Node, kind: str, norm: Norm) -> None:
        self.kind[node], self.norm_of[node] = kind, norm

    def _visit_module(self, node: Node, source: Node) -> None:
        module = self.gm.get_submodule(str(node.target))
        kind = self.kind[source]
        if isinstance(module, nn.LayerNorm) and kind == "stream":
            norm = Norm(node, node, node)
            self.stream.norms.append(norm)
            self._follow(node, "gained", norm)
        elif isinstance(module, nn.RMSNorm) and module.weight is None and kind == "stream":
            self._start_norm(node)
        elif isinstance(module, LINEAR) and kind in ("normed", "gained"):
            self.norm_of[source].readers.append(node)
        elif isinstance(module, LINEAR) and kind == "stream":
            self.stream.readers.append(node)
        else:
            self._refuse(node, f"a {type(module).__name__} reads the {kind}")

    def _is_square(self, node: Node) -> bool:
        args = node.args
        if is_a(node, Kind.POWER):
            return len(args) > 1 and bool(args[1] == 2)
        return is_a(node, Kind.PRODUCT) and args[0] is args[1]

    def _is_scalar(self, node: Node, operands: list[Node]) -> bool:
        return is_a(node, *_SCALAR) and all(n in operands for n in node.all_input_nodes)

    def _gain(self, node: Node) -> Tensor | None:
        """The vector [width] by which a normed value is multiplied."""
        others = [n for n in node.all_input_nodes if n not in self.kind]
        value = self.values.get(others[0]) if len(others) == 1 else None
        return value if isinstance(value, Tensor) and value.dim() == 1 else None

    def _keeps(self, node: Node, source: Node) -> bool:
        """A cast, a reshape that leaves the last dimension, or a scalar factor."""
        before, after = self.values.get(source), self.values.get(node)
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
        return is_a(node, *_SCALE) and self._constant_factor(node, source)

    def _constant_factor(self, node: Node, source: Node) -> bool:
        if is_a(node, Kind.QUOTIENT) and node.args[0] is not source:
            return False
        values = (
            self.values[a] if isinstance(a, Node) else a for a in node.args if a is not source
        )
        return all(not isinstance(v, Tensor) or v.dim() == 0 for v in values)

    def _add(self, node: Node) -> None:
        for operand in node.args:
            if not isinstance(operand, Node):
                self._refuse(node, "a number is added to the stream")
            elif operand not in self.kind:
                self._trace_back(operand, node)
        self.kind[node] = "stream"

    def _trace_back(self, node: Node, user: Node) -> None:
        """Find what wrote ``node``, which is added to the stream."""
        users = [u for u in node.users if not is_a(u, Kind.SHAPE)]
        if users != [user]:
            self._refuse(node, "is added to the residual stream, and also read elsewhere")
        module = None
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
        if isinstance(module, (*LINEAR, nn.Embedding)) or op_name(node) == "embedding":
            self.stream.writers.append(node)
        elif is_a(node, Kind.SUM) and all(isinstance(a, Node) for a in node.args):
            for operand in node.args:
                assert isinstance(operand, Node)
                self._trace_back(operand, node)
        elif node.args and isinstance(node.args[0], Node) and self._keeps(node, node.args[0]):
            self._trace_back(node.args[0], node)
        elif node.args and isinstance(node.args[-1], Node) and self._keeps(node, node.args[-1]):
            self._trace_back(node.args[-1], node)
        else:
            self._refuse(
                node, "is added to the residual stream, but neither a linear nor an embedding is"
            )
        self.kind[node] = "stream"


def _name(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _last_dim(node: Node) -> bool:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim")
    return dim in (-1, [-1], (-1,)) and keep is True


@torch.no_grad()
def _probe_values(gm: GraphModule) -> dict[Node, Any]:
    """Every node's value on a tiny batch: shapes, and parameters that are computed."""
    facts, values = info(gm), {}
    probe = Probe.random(facts.vocab_size, device_of(gm), length=min(5, facts.max_positions or 5))

    def keep(node: Node, value: Any) -> Any:
        values[node] = value
        return value

    Executor(gm).run(keep, input_ids=probe.input_ids, attention_mask=probe.attention_mask)
    return values
