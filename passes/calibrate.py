"""calibrate: run calibration batches through an observed graph, once."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule
from tqdm import tqdm

from fxquant.batches import Batches, model_inputs
from fxquant.errors import CalibrationError
from fxquant.execution import Executor
from fxquant.graph import Level, device_of, info
from fxquant.levels import is_observer
from fxquant.pipeline import Pass


@dataclass(frozen=True)
class Calibrate(Pass):
    """Stream ``batches`` through the graph up to its last observer.

    The graph stays as it is; its observers fill. Batches may be ragged and masked, may be a
    one-shot iterator, and are read once. Raises CalibrationError when no token was seen.
    """

    batches: Batches = field(repr=False, compare=False)
    progress: bool = False
    name = "calibrate"
    requires = (Level.OBSERVED,)
    # Observers change, the function does not: nothing is rewritten.
    effect = "lossy"

    def rewrite(self, gm: GraphModule) -> GraphModule:
        facts, device = info(gm), device_of(gm)
        executor = Executor(gm)
        found = [i for i, node in enumerate(executor.nodes) if is_observer(gm, node)]
        if not found:
            return gm
        end = executor.nodes[found[-1] + 1]
        total = len(self.batches) if isinstance(self.batches, Sized) else None
        # disable=None: quiet where the output is no terminal.
        bar = tqdm(
            self.batches, "calibrate", total, unit="batch", disable=None if self.progress else True
        )
        tokens = 0
        with torch.no_grad():
            for index, batch in enumerate(bar):
                inputs = model_inputs(batch, facts, index)
                tokens += int(
                    inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()
                )
                moved = {name: value.to(device) for name, value in inputs.items()}
                executor.advance(executor.start(**moved), until=end)
        if tokens == 0:
            raise CalibrationError(
                "calibration saw no token: the batches are empty or fully masked; static ranges "
                "need data (a dynamic scheme such as w8a8-dynamic needs none)"
            )
        return gm
