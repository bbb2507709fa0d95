"""A graph whose decoder blocks are compiled: one block once, its code used for all that are alike.

torch.compile on a whole graph compiles every block again, which takes as many times longer as there
are blocks. Here the graph is cut at its blocks; blocks whose code is the same text, with the same
constants, run one compiled function, each on its own leaves. What stands before the first block and
behind the last one (embeddings, rotary angles, the final norm) runs as it is, but for a float head,
which takes the faster of torch's GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxquant.errors import GraphCallError, GraphError
from fxquant.files.doors import reason
from fxquant.ir.blocks import block_starts, within
from fxquant.numerics.kernels.cpu_linear import linear
from fxquant.run.batched import is_streamed
from fxquant.run.execution import Cut, Executor
from fxquant.run.head import final_head

# What torch raises where it cannot compile: no C++ compiler, an operator that it cannot lower.
_UNCOMPILED = (torch._dynamo.exc.TorchDynamoException,)
# The processor is asked for AVX2 and AVX-512, which any compiler knows that takes torch's headers.
# By itself inductor also compiles and loads a library for each, which takes as long as compiling
# the block's kernels; for bf16, VNNI and AMX it still does.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"cpp.vec_isa_ok": True}


@dataclass(frozen=True)
class _Region:
    """A block's nodes as a function of its leaves and of ``inputs``, values of before; it returns
    ``outputs``, those that are read later. ``begin`` and ``end``: positions in the graph."""

    begin: int
    end: int
    leaves: nn.Module
    run: Callable[..., tuple[Any, ...]]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]


class CompiledBlocks:
    """A graph that is called like the one it was made of and gives its logits [batch, length,
    vocab], up to the roundings that a compiler moves.

    ``kinds``: how many functions are compiled, each at the first call that needs it and for its
    shapes: after a second length they take any. It reads the graph's own leaves: what is done to
    those is seen, a changed graph is not.

    Calls raise what the graph's own do, and GraphCallError where torch cannot compile here, with
    its reason.
    """

    def __init__(self, gm: GraphModule, regions: Sequence[_Region]) -> None:
        head = final_head(gm)
        self._gm: Any = gm
        self._executor = Executor(gm, instead={} if head is None else {head: _head(gm, head)})
        self._regions = tuple(regions)
        self.kinds = len({id(region.run) for region in regions})

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = self._gm.called(self._run, *args, **kwargs)
        return logits

    @torch.no_grad()
    def _run(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        executor = self._executor
        cut = executor.start(input_ids=input_ids, attention_mask=attention_mask)
        for region in self._regions:
            if cut.position < region.begin:
                cut = executor.advance(cut, executor.nodes[region.begin])
            cut = _through(region, cut, executor)
        logits: Tensor = executor.advance(cut).values[executor.nodes[-1]]
        return logits


def compiled_blocks(gm: GraphModule) -> CompiledBlocks:
    """``gm`` with its decoder blocks compiled by torch.compile, one of each kind once.

    At any level, for scoring: nothing is kept for a backward pass. Raises GraphError for what is no
    graph of fxquant, has no blocks, or has leaves that are streamed from files.
    """
    starts = block_starts(gm)
    if not starts.first:
        raise GraphError("the graph has no decoder blocks to compile: torch.compile(graph) does")
    if is_streamed(gm):
        raise GraphError("a streamed graph reads its leaves from files, which is not compiled")
    nodes = tuple(gm.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    ends = [position[node] for node in starts.first.values()]
    ends.append(len(nodes) - 1 if starts.behind is None else position[starts.behind])
    functions: dict[Any, Callable[..., tuple[Any, ...]]] = {}
    regions = []
    for block, (begin, end) in zip(starts.first, pairwise(ends), strict=True):
        regions.append(_region(gm, block, nodes, begin, end, functions))
    return CompiledBlocks(gm, regions)


def _region(
    gm: GraphModule,
    block: str,
    nodes: tuple[Node, ...],
    begin: int,
    end: int,
    functions: dict[Any, Callable[..., tuple[Any, ...]]],
) -> _Region:
    """The nodes from ``begin`` up to ``end``; ``functions``: those compiled so far, by their code.

    Names tell nothing of the block: its leaves stand at their paths within it, nodes are numbered.
    """
    inside = nodes[begin:end]
    own = set(inside)
    read = dict.fromkeys(n for node in inside for n in node.all_input_nodes if n not in own)
    outputs = tuple(node for node in inside if any(user not in own for user in node.users))
    graph, leaves = Graph(), nn.Module()
    copies = {node: graph.placeholder(f"input_{index}") for index, node in enumerate(read)}
    for index, node in enumerate(inside):
        args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
        target = node.target
        if node.op in ("call_module", "get_attr"):
            target = _kept(gm, leaves, str(target), block, node.op == "get_attr")
        copies[node] = graph.create_node(node.op, target, args, kwargs, name=f"node_{index}")
    graph.output(tuple(copies[node] for node in outputs))
    code = graph.python_code("self")
    key = (code.src, tuple(sorted((name, id(value)) for name, value in code.globals.items())))
    if key not in functions:
        function = type(GraphModule(leaves, graph)).forward
        functions[key] = torch.compile(function, options=_OPTIONS)
    return _Region(begin, end, leaves, functions[key], tuple(read), outputs)


def _kept(gm: GraphModule, leaves: nn.Module, target: str, block: str, is_tensor: bool) -> str:
    """Put the leaf that a node calls or reads below ``leaves``, and say where."""
    path, _, name = target.rpartition(".") if is_tensor else (target, "", "")
    inner = within(path, block)
    # What lies outside the block stands apart, so that no path of either is the other's.
    place = f"{'own' if inner != path else 'shared'}.{inner}"
    parent = leaves
    *parts, last = place.split(".")
    for part in parts:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent._modules[last] = gm.get_submodule(path)
    return f"{place}.{name}" if is_tensor else place


def _head(gm: GraphModule, node: Node) -> Callable[[Tensor], Tensor]:
    module = gm.get_submodule(str(node.target))
    assert isinstance(module, nn.Linear)
    return lambda x: linear(x, module.weight, module.bias)


def _through(region: _Region, cut: Cut, executor: Executor) -> Cut:
    values = dict(cut.values)
    try:
        found = region.run(region.leaves, *(values[node] for node in region.inputs))
    except _UNCOMPILED as error:
        executor.advance(cut, executor.nodes[region.end])  # what cannot be computed at all says so
        # The backend's failure is wrapped in one that only names the backend.
        cause = getattr(error, "inner_exception", error)
        raise GraphCallError(
            f"torch.compile cannot compile a block of the graph here: {reason(cause)}; the graph "
            "itself runs uncompiled"
        ) from error
    values.update(zip(region.outputs, found, strict=True))
    return Cut(region.end, values)
