"""Seconds of gptq over SmolLM2, against the reference class in a plain layer loop.

    python -m benchmarks.gptq_cost [--quick] [--ours-only]

Reference: IST-DASLab's gptq.py as opt.py drives it (hooks collect each linear's Hessian over one
forward of the block, then each linear is solved, then the block runs once more). Ours:
``convert(model, "w4-g128-asym+gptq", level="float")`` on the same windows. ``--quick`` takes 2
calibration windows and 4 blocks. Writes benchmarks/gptq_cost.json. Measure alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxquant
from benchmarks.memory import MODEL
from fxquant.evaluation.data import cut_windows, load_text
from fxquant.evaluation.models import load_model, versions

SCHEME = "w4-g128-asym+gptq"
LENGTH = 512


class ReferenceGptq:
    """The reference class: H = 2 X X^T / n, asymmetric min-max grids, blocks of 128 columns."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.hessian = torch.zeros(layer.in_features, layer.in_features)
        self.samples = 0

    def add_batch(self, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1]).t()
        self.hessian *= self.samples / (self.samples + 1)
        self.samples += 1
        rows = (2 / self.samples) ** 0.5 * rows.float()
        self.hessian += rows.matmul(rows.t())

    def solve(self, group_size: int = 128, block_size: int = 128, damping: float = 0.01) -> None:
        weight, hessian = self.layer.weight.data.clone(), self.hessian
        columns = weight.shape[1]
        dead = hessian.diagonal() == 0
        hessian[dead, dead] = 1
        weight[:, dead] = 0
        hessian.diagonal().add_(damping * hessian.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        inverse = torch.linalg.cholesky(inverse, upper=True)
        result = torch.zeros_like(weight)
        scale = zero = torch.zeros(len(weight), 1)
        for start in range(0, columns, block_size):
            end = min(start + block_size, columns)
            block = weight[:, start:end].clone()
            errors = torch.zeros_like(block)
            inner = inverse[start:end, start:end]
            for i in range(end - start):
                column = block[:, i]
                if (start + i) % group_size == 0:
                    group = weight[:, start + i : start + i + group_size]
                    low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                    scale = ((high - low) / 15)[:, None]
                    zero = torch.round(-low[:, None] / scale)
                codes = torch.clamp(torch.round(column[:, None] / scale) + zero, 0, 15)
                result[:, start + i] = (scale * (codes - zero)).flatten()
                error = (column - result[:, start + i]) / inner[i, i]
                block[:, i:] -= error[:, None].matmul(inner[i, i:][None])
                errors[:, i] = error
            weight[:, end:] -= errors.matmul(inverse[start:end, end:])
        self.layer.weight.data = result


@torch.no_grad()
def reference(model: Any, windows: Tensor, blocks: int) -> None:
    """The plain layer loop over the first ``blocks`` decoder blocks."""
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    class Stop(Exception):
        pass

    def catch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        caught.append((args[0], kwargs))
        raise Stop

    layers = model.model.layers
    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids in windows.split(1):
        try:
            model(input_ids=ids, use_cache=False)
        except Stop:
            continue
    handle.remove()
    states = [hidden for hidden, _ in caught]
    for layer in layers[:blocks]:
        solvers = {m: ReferenceGptq(m) for m in layer.modules() if isinstance(m, nn.Linear)}
        handles = [
            module.register_forward_hook(
                lambda _, args, __, solver=solver: solver.add_batch(args[0])
            )
            for module, solver in solvers.items()
        ]
        for hidden, (_, kwargs) in zip(states, caught, strict=True):
            layer(hidden, **kwargs)
        for each in handles:
            each.remove()
        for solver in solvers.values():
            solver.solve()
        outputs = [layer(h, **kwargs) for h, (_, kwargs) in zip(states, caught, strict=True)]
        states = [out if isinstance(out, Tensor) else out[0] for out in outputs]


def ours(model: Any, windows: Tensor) -> None:
    """Trace and the repair."""
    fxquant.convert(model, SCHEME, calibration=list(windows.split(1)), level="float")


def timed(run: Callable[[], None]) -> dict[str, float]:
    """Wall seconds, and seconds of the processor, which a busy machine disturbs less."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ours-only", action="store_true")
    options = parser.parse_args()
    count = 2 if options.quick else 16
    loaded = load_model(MODEL)
    model: Any = loaded.model
    if options.quick:
        model.model.layers = model.model.layers[:4]
    windows = cut_windows(
        load_text("builtin"), loaded.tokenizer, count=1, length=LENGTH, calibration=count, seed=0
    ).calibration
    seconds = {"ours": timed(lambda: ours(model, windows))}
    ratios = None
    if not options.ours_only:
        blocks = len(model.model.layers)
        seconds["reference"] = timed(lambda: reference(model, windows, blocks))
        ratios = {k: seconds["ours"][k] / seconds["reference"][k] for k in ("wall", "cpu")}
    result = {
        "model": MODEL,
        "revision": loaded.revision,
        "scheme": SCHEME,
        "windows": [count, LENGTH],
        "blocks": len(model.model.layers),
        "seconds": seconds,
        "ratio": ratios,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))
    if not options.quick:
        Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
