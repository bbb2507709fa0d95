"""Batches through a graph block by block, where leaves are streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from tqdm import tqdm

from fxquant.ir.blocks import block_starts
from fxquant.ir.streamed import Streamed
from fxquant.run.execution import Cut, Executor, OnNode


def is_streamed(gm: GraphModule) -> bool:
    """Whether some leaf of the graph is read from a file."""
    return any(isinstance(module, Streamed) for module in gm.modules())


def run_batches(
    gm: GraphModule,
    inputs: Sequence[dict[str, Tensor]],
    watchers: Sequence[OnNode | None] | None = None,
    until: Node | None = None,
    label: str = "",
    finish: Callable[[Executor, Cut, int], Any] | None = None,
) -> Iterator[Any]:
    """The graph's output (None if ``until`` stops before it) for each of ``inputs``, in order.

    ``finish``: what runs the rest, behind the last block, of the input with this index, and gives
    what stands in the output's place.

    All of them go through one block before the next begins; a streamed leaf is read once and let
    go with its block. ``watchers``: an ``on_node`` for each of the inputs. Memory: what is alive
    between two blocks, for every input. The caller chooses the grad mode. With a ``label``: a
    progress bar over the blocks, on a terminal.
    """
    executor = Executor(gm)
    watchers = [None] * len(inputs) if watchers is None else watchers
    cuts = [executor.start(**each) for each in inputs]
    last = len(executor.nodes) if until is None else executor.position[until]
    quiet = None if label else True
    found = block_starts(gm)
    starts = [*found.first.values(), *([found.behind] if found.behind else [])]
    for node in tqdm(starts, label, unit="block", leave=False, disable=quiet):
        if executor.position[node] < last:
            with executor.holding(cuts[0].position if cuts else 0, node):
                for index, watcher in enumerate(watchers):
                    cuts[index] = executor.advance(cuts[index], node, watcher)
    with executor.holding(cuts[0].position if cuts else 0, until):
        for index, (cut, watcher) in enumerate(zip(cuts, watchers, strict=True)):
            if finish is not None:
                yield finish(executor, cut, index)
                continue
            end = executor.advance(cut, until, watcher)
            yield end.values.get(executor.nodes[-1])
