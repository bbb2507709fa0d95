"""calibrate: run calibration batches through an observed graph, once."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule
from tqdm import tqdm

from fxquant.errors import CalibrationError
from fxquant.ir.graph import Level, device_of, info
from fxquant.ir.legal_forms import observer_nodes
from fxquant.passes.observe import observers
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass
from fxquant.run.batched import is_streamed, run_batches
from fxquant.run.batches import Batch, Batches, model_inputs
from fxquant.run.distributed import is_main, is_mine, merge_observers
from fxquant.run.execution import Executor


@dataclass(frozen=True)
class Calibrate(Pass):
    """Stream the context's batches through the graph up to its last observer.

    The graph stays as it is; its observers fill. Batches may be ragged and masked, may be a
    one-shot iterator, and are read once. A streamed graph takes all of them through one block
    after the other; several processes (torchrun) share them out. Raises CalibrationError when no
    token was seen.
    """

    name = "calibrate"
    requires = (Level.OBSERVED,)
    # Observers change, the function does not: nothing is rewritten.
    effect = "lossy"

    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        facts, device = info(gm), device_of(gm)
        executor = Executor(gm)
        found = observer_nodes(gm)
        if not found:
            return gm
        end = found[-1].next
        if context.batches is None:
            raise CalibrationError("calibrate needs calibration data: give the context batches")
        inputs: list[dict[str, Tensor]] = []
        tokens = 0
        with torch.no_grad():
            for index, batch in enumerate(_bar(context.batches, context.progress)):
                checked = model_inputs(batch, facts, index)
                ids = checked["input_ids"]
                tokens += int(checked.get("attention_mask", torch.ones_like(ids)).sum())
                if not is_mine(index):
                    continue
                moved = {name: value.to(device) for name, value in checked.items()}
                if is_streamed(gm):
                    inputs.append(moved)  # all of them together, block by block
                else:
                    executor.advance(executor.start(**moved), until=end)
            if inputs:
                list(run_batches(gm, inputs, until=end, label="calibrate" * context.progress))
        merge_observers(observers(gm).values())
        if tokens == 0:
            raise CalibrationError(
                "calibration saw no token: the batches are empty or fully masked; static ranges "
                "need data (a dynamic scheme such as w8a8-dynamic needs none)"
            )
        return gm


def _bar(batches: Batches, progress: bool) -> Iterable[Batch]:
    total = len(batches) if isinstance(batches, Sized) else None
    # disable=None: quiet where the output is no terminal.
    quiet = None if progress and is_main() else True
    return tqdm(batches, "calibrate", total, unit="batch", disable=quiet)
