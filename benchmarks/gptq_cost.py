"""Seconds of gptq over SmolLM2, against the reference class in its layer loops.

    python -m benchmarks.gptq_cost [--quick]

The reference is IST-DASLab's gptq.py, driven in two ways. "block", as opt.py does: hooks collect
every linear's Hessian over one forward of the block, all are solved, the block runs once more: two
forwards. "layer", as llama.py does with --true-sequential: q, k and v, then o, then gate and up,
then down see what was quantized before them in their own block: five forwards.

Ours is ``convert(model, scheme, level="float")`` on the same windows: ``gptq(within=block,
grid=minmax)`` computes what "block" does, ``gptq``, the default, what "layer" does, and searches
its grids besides. ``--quick`` takes 2 calibration windows and 4 blocks. Writes
benchmarks/gptq_cost.json. Measure alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
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

SCHEMES = {
    "block": "w4-g128-asym+gptq(within=block,grid=minmax)",
    "layer": "w4-g128-asym+gptq",
}
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


def catch_inputs(model: Any, windows: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
    """What each window hands to the first block."""
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    class Stop(Exception):
        pass

    def catch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        caught.append((args[0], kwargs))
        raise Stop

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids in windows.split(1):
        with contextlib.suppress(Stop):
            model(input_ids=ids, use_cache=False)
    handle.remove()
    return caught


def subsets(layer: Any, within: str) -> list[list[nn.Linear]]:
    """The linears that are solved after one forward."""
    attention, mlp = layer.self_attn, layer.mlp
    found = [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]
    return found if within == "layer" else [[module for part in found for module in part]]


@torch.no_grad()
def reference(model: Any, windows: Tensor, within: str) -> None:
    """The layer loop; the model's weights become the quantized ones."""
    caught = catch_inputs(model, windows)
    states = [hidden for hidden, _ in caught]
    for layer in model.model.layers:
        for modules in subsets(layer, within):
            solvers = {module: ReferenceGptq(module) for module in modules}
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


def ours(model: Any, windows: Tensor, within: str) -> None:
    """Trace and the repair."""
    fxquant.convert(model, SCHEMES[within], calibration=list(windows.split(1)), level="float")


def timed(run: Callable[[], None]) -> dict[str, float]:
    """Wall seconds, and seconds of the processor, which a busy machine disturbs less."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    count = 2 if quick else 16
    loaded = load_model(MODEL)
    model: Any = loaded.model
    if quick:
        model.model.layers = model.model.layers[:4]
    windows = cut_windows(
        load_text("builtin"), loaded.tokenizer, count=1, length=LENGTH, calibration=count, seed=0
    ).calibration
    seconds: dict[str, dict[str, float]] = {}
    for within in SCHEMES:
        for run in (ours, reference):
            fresh = copy.deepcopy(model)
            seconds[f"{run.__name__} {within}"] = timed(
                functools.partial(run, fresh, windows, within)
            )
    ratios = {
        within: {
            clock: seconds[f"ours {within}"][clock] / seconds[f"reference {within}"][clock]
            for clock in ("wall", "cpu")
        }
        for within in SCHEMES
    }
    result = {
        "model": MODEL,
        "revision": loaded.revision,
        "schemes": SCHEMES,
        "windows": [count, LENGTH],
        "blocks": len(model.model.layers),
        "seconds": seconds,
        "ratio": ratios,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))
    if not quick:
        Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
