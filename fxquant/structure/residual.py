"""The residual stream of a graph, found by dataflow: who writes to it, who reads it, what is odd.

Every value is classed by what an orthogonal change of basis of the stream does to it. The token
embedding starts the stream; sums, casts, reshapes and factors that all channels share keep it; a
mean of squares does not change; a linear ends it; what is added to it is traced back to what wrote
it.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.errors import ModelError
from fxquant.files.tensor_file import dtype_name
from fxquant.ir.blocks import block_of
from fxquant.ir.graph import device_of, info
from fxquant.ir.operands import op_name
from fxquant.run.execution import Executor
from fxquant.run.probe import Probe
from fxquant.structure.stream import (
    SCALE,
    Norm,
    ResidualStream,
    is_linear_call,
    is_lookup,
    is_mean,
    is_square,
    keeps,
    uncast,
    weight_of,
    whole_norm,
)
from fxquant.structure.vocabulary import Kind, is_a

_SCALAR = (*SCALE, Kind.SUM, Kind.ROOT, Kind.POWER)
# A value's kind: what its square and its mean are, and which two make a norm by their product.
# "deviation" is the stream without its mean; a scalar or a variance is one number for each token.
_SQUARES: Final = {"stream": "squares", "deviation": "squared deviations"}
_MEANS: Final = {"stream": "mean", "squares": "scalar", "squared deviations": "variance"}
_NORMED: Final = ({"stream", "scalar"}, {"deviation", "variance"})


def residual_stream(gm: GraphModule) -> ResidualStream:
    """The stream of ``gm``; ModelError, with the node and the reason, where it has no rotation."""
    return _Analysis(gm).run()


def token_lookup(gm: GraphModule) -> Node | None:
    """The node that looks tokens up, by a module or by a function."""
    path = info(gm).embeddings
    for node in gm.graph.nodes:
        if not is_lookup(gm, node):
            continue
        table = weight_of(node)
        if path == (str(node.target) if table is None else str(table.target).rpartition(".")[0]):
            return node  # type: ignore[no-any-return]
    return None


class _Analysis:
    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.values = probe_values(gm)
        self.kind: dict[Node, str] = {}  # those of the tables above, "normed" and "gained"
        self.norm_of: dict[Node, Norm] = {}

    def run(self) -> ResidualStream:
        start = token_lookup(self.gm)
        if start is None:
            raise ModelError(
                f"rotate: {info(self.gm).model} looks tokens up otherwise than in a table of one "
                "weight, where a rotated stream could start"
            )
        self.stream = ResidualStream(int(self.values[start].shape[-1]), [start])
        self.kind[start] = "stream"
        self._start_behind_a_norm(start)
        for node in self.gm.graph.nodes:
            if node is not start and node.op != "output":
                self._visit(node)
            if node.op == "output" and any(arg in self.kind for arg in node.all_input_nodes):
                self._refuse(node, "the output is the residual stream itself, no head reads it")
        self._check_blocks()
        return self.stream

    def _start_behind_a_norm(self, start: Node) -> None:
        """A module that normalizes the embedding, and whose result starts the stream."""
        readers = [user for user in start.users if not is_a(user, Kind.SHAPE)]
        if len(readers) != 1 or readers[0].op != "call_module":
            return
        if whole_norm(self.gm, readers[0], self.values) and self._is_stream(readers[0]):
            self.stream.lookup_norm = readers[0]
            self.kind[readers[0]] = "stream"

    def _is_stream(self, node: Node) -> bool:
        """Whether sums or norms read ``node``: what a linear alone reads is a norm's result."""
        readers = [user for user in node.users if not is_a(user, Kind.SHAPE)]
        return any(not is_linear_call(self.gm, user) for user in readers)

    def _refuse(self, node: Node, why: str) -> None:
        raise ModelError(
            f"rotate: {info(self.gm).model}: {_name(node)}: {why}; its residual stream cannot be "
            "rotated without changing the function"
        )

    def _check_blocks(self) -> None:
        readers = [r for norm in self.stream.norms for r in norm.readers] + self.stream.readers
        blocks = info(self.gm).blocks
        reading = {
            block_of(str((weight_of(reader) or reader).target), blocks) for reader in readers
        }
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
        if is_linear_call(self.gm, node):
            self._read(node, operands)
        elif (norm := whole_norm(self.gm, node, self.values)) is not None:
            if kinds != {"stream"}:
                self._refuse(node, f"a norm reads the {' and '.join(sorted(kinds))}")
            self.stream.norms.append(norm)
            self._follow(node, "gained", norm)
        elif node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            self._refuse(node, f"a {type(module).__name__} reads the {self.kind[operands[0]]}")
        elif (kind := self._invariant(node, operands, kinds)) is not None:
            self.kind[node] = kind
        elif kinds in _NORMED and is_a(node, Kind.PRODUCT):
            norm = Norm(node, node, centred="deviation" in kinds)
            self.stream.norms.append(norm)
            self._follow(node, "normed", norm)
        elif kinds == {"normed"} and is_a(node, Kind.PRODUCT) and self._gain(node) is not None:
            norm = self.norm_of[operands[0]]
            if norm.gain is not None or norm.readers:
                self._refuse(node, "one norm is read with two gains, and only one can be folded")
            norm.node, norm.normed, norm.gain = node, operands[0], self._gain(node)
            self._follow(node, "gained", norm)
        elif len(kinds) == 1 and keeps(node, operands[0], self.values):
            self._keep(node, operands[0])
        elif kinds == {"stream"} and is_a(node, Kind.SUM):
            self._add(node)
        elif is_a(node, Kind.SUM) and kinds <= {"stream", "normed", "gained"}:
            self._refuse(node, "adds to what a norm gives: the norms stand in the stream itself")
        else:
            what = " and ".join(sorted(kinds))
            self._refuse(node, f"reads the {what} in a way that does not commute with a rotation")

    def _read(self, node: Node, operands: list[Node]) -> None:
        """A linear ends the stream, or what a norm of it gives."""
        kind = self.kind[operands[0]]
        if kind in ("normed", "gained"):
            norm = self.norm_of[operands[0]]
            if kind == "normed" and norm.gain is not None:
                self._refuse(node, "one norm is read with its gain and without")
            norm.readers.append(node)
        elif kind == "stream":
            self.stream.readers.append(node)
        else:
            self._refuse(node, f"a linear reads the {kind}")

    def _invariant(self, node: Node, operands: list[Node], kinds: set[str]) -> str | None:
        """What squares, means and scalars of the stream are, and its deviation from the mean."""
        if kinds == {"stream", "mean"} and self._is_deviation(node):
            self.stream.deviations.append(node)
            return "deviation"
        if len(kinds) != 1:
            return None
        kind = next(iter(kinds))
        if is_square(node) and kind in _SQUARES:
            return _SQUARES[kind]
        if is_mean(node) and kind in _MEANS:
            return _MEANS[kind]
        return kind if kind in ("scalar", "variance") and _is_scalar(node, operands) else None

    def _is_deviation(self, node: Node) -> bool:
        """Whether the node is x - mean(x) of one x."""
        if not is_a(node, Kind.DIFFERENCE) or len(node.args) != 2 or node.kwargs:
            return False
        x, mean = node.args
        assert isinstance(mean, Node)
        return self.kind.get(mean) == "mean" and uncast(x) is uncast(mean.args[0])

    def _follow(self, node: Node, kind: str, norm: Norm) -> None:
        self.kind[node], self.norm_of[node] = kind, norm

    def _keep(self, node: Node, source: Node) -> None:
        self.kind[node] = self.kind[source]
        norm = self.norm_of.get(source)
        if norm is None:
            return
        if norm.bias is not None and is_a(node, *SCALE):
            self._refuse(node, "scales what a norm with a bias gives, which its readers would take")
        self.norm_of[node] = norm

    def _gain(self, node: Node) -> Tensor | None:
        """The vector [width] by which a normed value is multiplied."""
        others = [n for n in node.all_input_nodes if n not in self.kind]
        value = self.values.get(others[0]) if len(others) == 1 else None
        return value if isinstance(value, Tensor) and value.dim() == 1 else None

    def _add(self, node: Node) -> None:
        for operand in node.args:
            if not isinstance(operand, Node):
                self._refuse(node, "a number is added to the stream")
            elif operand not in self.kind:
                self._trace_back(operand, node)
        self.kind[node] = "stream"

    def _trace_back(self, node: Node, user: Node) -> None:
        """Find what wrote ``node``, which is added to the stream; if no weight did, it is turned.

        A value that is read elsewhere too keeps its basis, so that it is turned where it is added.
        """
        alone = [u for u in node.users if not is_a(u, Kind.SHAPE)] == [user]
        nodes = [a for a in node.args if isinstance(a, Node)]
        if alone and (is_linear_call(self.gm, node) or is_lookup(self.gm, node)):
            self.stream.writers.append(node)
            self.kind[node] = "stream"
        elif alone and is_a(node, Kind.SUM) and self._same_shape(node, nodes):
            for operand in nodes:
                self._trace_back(operand, node)
            self.kind[node] = "stream"
        elif alone and nodes and keeps(node, nodes[0], self.values):
            self._trace_back(nodes[0], node)
            self.kind[node] = "stream"
        elif alone and nodes and keeps(node, nodes[-1], self.values):
            self._trace_back(nodes[-1], node)
            self.kind[node] = "stream"
        else:
            self._turn(node, user)

    def _same_shape(self, node: Node, operands: list[Node]) -> bool:
        """Whether nothing but values [..., width] are summed."""
        widths = [getattr(self.values.get(each), "shape", (0,))[-1:] for each in operands]
        return len(operands) == len(node.args) and set(widths) == {(self.stream.width,)}

    def _turn(self, node: Node, user: Node) -> None:
        value = self.values.get(node)
        if not isinstance(value, Tensor) or value.shape[-1:] != (self.stream.width,):
            self._refuse(node, "is added to the residual stream, but is no vector for each token")
        node, user = self._in_the_streams_dtype(node, user)
        if (node, user) not in self.stream.turned:
            self.stream.turned.append((node, user))

    def _in_the_streams_dtype(self, node: Node, user: Node) -> tuple[Node, Node]:
        """What ``node`` is cast to, and its user: a norm of a half model computes in float32."""
        dtype = self.values[self.stream.writers[0]].dtype
        while (own := self.values[node].dtype) != dtype:
            if not keeps(user, node, self.values):
                self._refuse(node, f"is added to the residual stream in {dtype_name(own)}")
            readers = [each for each in user.users if not is_a(each, Kind.SHAPE)]
            node, user = user, readers[0]
        return node, user


def _is_scalar(node: Node, operands: list[Node]) -> bool:
    return is_a(node, *_SCALAR) and all(n in operands for n in node.all_input_nodes)


def _name(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


@torch.no_grad()
def probe_values(gm: GraphModule) -> dict[Node, Any]:
    """Every node's value on a tiny batch: shapes, and parameters that are computed."""
    facts, values = info(gm), {}
    probe = Probe.random(facts.vocab_size, device_of(gm), length=min(5, facts.max_positions or 5))

    def keep(node: Node, value: Any) -> Any:
        values[node] = value
        return value

    Executor(gm).run(keep, input_ids=probe.input_ids, attention_mask=probe.attention_mask)
    return values
