"""Statistics of activations for repairs: observers fed without a node in the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from tqdm import tqdm

from fxquant.errors import CalibrationError
from fxquant.ir.functions import default_mask
from fxquant.ir.graph import device_of, info
from fxquant.numerics.observers import Observer
from fxquant.run.batched import is_streamed, run_batches
from fxquant.run.batches import Batches, model_inputs
from fxquant.run.distributed import is_mine, merge_observers, merges_exactly
from fxquant.run.execution import Executor, OnNode


@torch.no_grad()
def observe_nodes(
    gm: GraphModule,
    observers: Mapping[Node, Observer],
    batches: Batches | None,
    *,
    label: str,
    progress: bool = False,
) -> None:
    """Show each node's values on all batches to its observer, in one run.

    Stops behind the last node asked for; padding does not count. Several processes (torchrun)
    share the batches out where all observers merge exactly; otherwise each reads all. Raises
    CalibrationError for missing or unusable batches and where no token was seen, NonFiniteError
    from the observers.
    """
    if batches is None:
        raise CalibrationError(
            f"{label} needs calibration data: pass calibration=batches (LongTensors "
            "[batch, length])"
        )
    facts, device = info(gm), device_of(gm)
    for observer in observers.values():
        observer.to(device)  # also one that sees nothing here: processes merge on the device
    shared = all(merges_exactly(observer) for observer in observers.values())
    executor = Executor(gm)
    last = max(executor.position[node] for node in observers)
    until = executor.nodes[last + 1]
    total = len(batches) if isinstance(batches, Sized) else None
    # disable=None: quiet where the output is no terminal.
    bar = tqdm(batches, label, total, unit="batch", disable=None if progress else True)
    checked = (
        {k: v.to(device) for k, v in model_inputs(batch, facts, index).items()}
        for index, batch in enumerate(bar)
        if not shared or is_mine(index)
    )
    if is_streamed(gm):
        inputs = list(checked)
        watchers = [_watcher(observers, **each) for each in inputs]
        if inputs:
            list(run_batches(gm, inputs, watchers, until))
    else:
        for each in checked:
            executor.advance(executor.start(**each), until, _watcher(observers, **each))
    if shared:
        merge_observers(observers.values())
    if all(int(observer.tokens) == 0 for observer in observers.values()):
        raise CalibrationError(
            f"{label} saw no token: the batches are empty or fully masked (was a one-shot iterator "
            "used up?)"
        )


def _watcher(
    observers: Mapping[Node, Observer], input_ids: Tensor, attention_mask: Tensor | None = None
) -> OnNode:
    """Shows one batch's values to the observers."""
    mask = default_mask(attention_mask, input_ids)

    def on_node(node: Node, value: Any) -> Any:
        if node in observers:
            observers[node](value, mask)
        return value

    return on_node
