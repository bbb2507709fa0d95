"""Run a graph from one node to another, for many batches, keeping only what is live at the cut."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import GraphModule, Interpreter, Node

from fxquant.errors import GraphCallError
from fxquant.files.doors import reason
from fxquant.ir.graph import tag
from fxquant.ir.operands import op_name
from fxquant.ir.streamed import held
from fxquant.run.uncomputable import uncomputable

OnNode = Callable[[Node, Any], Any]
# What torch raises for a row that a table lacks, and for a dtype that it has no kernel of.
UNCOMPUTABLE: Final = (IndexError, NotImplementedError)


@dataclass(frozen=True)
class Cut:
    """A run stopped before ``position``: the values still needed from there on."""

    position: int
    values: Mapping[Node, Any]


class Executor:
    """Interprets a GraphModule with liveness: a value is dropped after its last use.

    ``on_node(node, value)`` sees every value and returns what goes on in its place. A node in
    ``instead`` is computed by that function of its arguments. Nodes in ``skip``, which have no
    users, are not run. The caller chooses the grad mode. The graph must
    not change while an Executor of it is in use.

    A run raises GraphCallError, naming the node, for a row that a table lacks, a dtype that torch
    has no kernel of, values that an operator does not take, and tensors of the graph that were
    moved or cast by themselves.
    """

    def __init__(
        self,
        gm: GraphModule,
        skip: Collection[Node] = (),
        instead: Mapping[Node, Callable[..., Any]] | None = None,
    ) -> None:
        self._gm = gm
        self._skip = frozenset(skip)
        self._instead = dict(instead or {})
        self._interpreter = Interpreter(gm, garbage_collect_values=False)
        self.nodes: tuple[Node, ...] = tuple(gm.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        last_use: dict[Node, Node] = {}
        for node in self.nodes:
            for used in (node, *node.all_input_nodes):
                last_use[used] = node
        self._dead_after: dict[Node, list[Node]] = {}
        for used, user in last_use.items():
            self._dead_after.setdefault(user, []).append(used)

    def start(self, **inputs: Any) -> Cut:
        """The cut behind the placeholders; raises TypeError for missing or unknown inputs."""
        values: dict[Node, Any] = {}
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        for node in placeholders:
            if node.target not in inputs and not node.args:
                raise TypeError(f"the graph needs input {node.target!r}")
            values[node] = inputs.get(str(node.target), node.args[0] if node.args else None)
        unknown = set(inputs) - {str(node.target) for node in placeholders}
        if unknown:
            raise TypeError(f"the graph takes no input {sorted(unknown)}")
        return Cut(len(placeholders), values)

    def advance(
        self,
        cut: Cut,
        until: Node | None = None,
        on_node: OnNode | None = None,
        instead: Mapping[Node, Callable[..., Any]] | None = None,
    ) -> Cut:
        """Run from ``cut`` up to, not including, ``until`` (None: to the end).

        ``instead`` counts for this run only, and before the Executor's own.
        """
        end = len(self.nodes) if until is None else self.position[until]
        replaced = {**self._instead, **(instead or {})}
        env = dict(cut.values)
        for node in self.nodes[cut.position : end]:
            value = self._run(node, env, replaced)
            env[node] = value if on_node is None else on_node(node, value)
            for dead in self._dead_after.get(node, ()):
                if node.op != "output":
                    del env[dead]
        return Cut(end, env)

    @contextlib.contextmanager
    def holding(self, begin: int, until: Node | None = None) -> Iterator[None]:
        """Within the block, streamed leaves of the nodes from position ``begin`` up to, not
        including, ``until`` are read once, at their first use, and let go at the end of it."""
        end = len(self.nodes) if until is None else self.position[until]
        used = [node for node in self.nodes[begin:end] if node.op in ("call_module", "get_attr")]
        with held(self.leaf(node) for node in used):
            yield

    def leaf(self, node: Node) -> torch.nn.Module:
        """The module that a node calls, or whose tensor it reads."""
        path = str(node.target)
        return self._gm.get_submodule(path if node.op == "call_module" else path.rpartition(".")[0])

    def run(self, on_node: OnNode | None = None, **inputs: Any) -> Any:
        """The graph's output."""
        return self.advance(self.start(**inputs), on_node=on_node).values[self.nodes[-1]]

    def _run(
        self, node: Node, env: Mapping[Node, Any], instead: Mapping[Node, Callable[..., Any]]
    ) -> Any:
        if node in self._skip:
            return None
        if node.op == "output":
            return torch.fx.node.map_arg(node.args[0], lambda n: env[n])
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
        if node in instead:
            return instead[node](*args, **kwargs)
        try:
            return getattr(self._interpreter, node.op)(node.target, args, kwargs)
        except UNCOMPUTABLE as error:
            site = f" of {tag(node).site}" if tag(node).site else ""
            raise GraphCallError(
                f"node {node.name}{site}: {op_name(node) or node.target} cannot be computed here: "
                f"{reason(error)}"
            ) from error
        except RuntimeError as error:
            if (said := uncomputable(self._gm, error)) is None:
                raise
            raise GraphCallError(f"node {node.name}: {said}") from error
