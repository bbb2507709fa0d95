"""Speed and memory of the integer graph and of conversion, as ratios measured in one run.

    python -m benchmarks.speed [--rounds 7] [--no-compile]

Each candidate alternates with the eager float model (A B A B ...), so that a slow spell of the
machine hits both; a ratio is that of medians. Writes benchmarks/speed.json. Measure alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxquant
from benchmarks.fake_quant import swap_linears
from benchmarks.memory import MODEL
from fxquant.evaluation.data import cut_windows, load_text
from fxquant.evaluation.models import load_model, versions

LENGTH = 512
Step = Callable[[], object]


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each step over ``rounds`` rounds, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if index:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios_to(base: str, steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Each step against ``base`` alone, A B A B: other candidates would empty the caches."""
    found: dict[str, float] = {}
    for name, step in steps.items():
        if name != base:
            pair = interleaved({base: steps[base], name: step}, rounds)
            found[name] = pair[name] / pair[base]
    return found


def memory() -> dict[str, int]:
    """Bytes of float model, codes and convert's peak growth, in a process of its own."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-m", "benchmarks.memory"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def forwards(model: nn.Module, ids: Tensor, compiled: bool) -> dict[str, Step]:
    """The float model, its graph, quantized graphs and a float fake-quant module swap."""
    integer = fxquant.convert(model, "w8a8-dynamic-token")
    modules: dict[str, Callable[..., Any]] = {
        "float model, eager": model,
        "float graph": fxquant.trace(model),
        "w8a8-dynamic-token graph": integer,
        "w8 graph": fxquant.convert(model, "w8"),
        "fake-quant module swap": swap_linears(model),
    }
    if compiled:
        modules["w8a8-dynamic-token graph, compiled"] = torch.compile(integer)
        modules["float model, compiled"] = torch.compile(model)

    def step(module: Callable[..., Any]) -> Step:
        more = {} if isinstance(module, torch.fx.GraphModule) else {"use_cache": False}
        if module is modules.get("w8a8-dynamic-token graph, compiled"):
            more = {}
        return lambda: module(input_ids=ids, **more)

    return {name: step(module) for name, module in modules.items()}


def conversions(model: nn.Module, ids: Tensor, calibration: Tensor) -> dict[str, Step]:
    """The cost of convert, and of calibration alone, beside one forward of a window."""
    batches = list(calibration.split(1))
    graph = fxquant.trace(model)

    def observe(count: int) -> Step:
        return lambda: fxquant.convert(
            graph, "w8a8-static:absmax", calibration=batches[:count], level="observed"
        )

    return {
        "one forward": lambda: model(input_ids=ids, use_cache=False),
        "convert w8a8-dynamic-token": lambda: fxquant.convert(model, "w8a8-dynamic-token"),
        "observe 1 window": observe(1),
        f"observe {len(batches)} windows": observe(len(batches)),
    }


@torch.no_grad()
def measure(rounds: int, compiled: bool) -> dict[str, Any]:
    loaded = load_model(MODEL)
    windows = cut_windows(
        load_text("builtin"), loaded.tokenizer, count=1, length=LENGTH, calibration=5, seed=0
    )
    model, ids = loaded.model, windows.evaluation
    memory_bytes = memory()
    size, codes, grown = memory_bytes.values()
    ratios = ratios_to("float model, eager", forwards(model, ids, compiled), rounds)
    work = interleaved(conversions(model, ids, windows.calibration), max(3, rounds // 2))
    many = next(name for name in work if name.startswith("observe") and "1 window" not in name)
    extra = len(windows.calibration) - 1
    calibrate = (work[many] - work["observe 1 window"]) / extra
    return {
        "model": MODEL,
        "revision": loaded.revision,
        "length": LENGTH,
        "rounds": rounds,
        "versions": versions(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": work,
        "ratios": {
            **ratios,
            "convert w8a8-dynamic-token / forward": work["convert w8a8-dynamic-token"]
            / work["one forward"],
            "calibration per window / forward": calibrate / work["one forward"],
            "peak memory of convert / (float + codes)": (size + grown) / (size + codes),
        },
        "megabytes": {name: value / 1e6 for name, value in memory_bytes.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    result = measure(options.rounds, not options.no_compile)
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(tabulate(result["ratios"].items(), ("measured", "ratio"), floatfmt=".3f"))
    print(tabulate(result["megabytes"].items(), ("memory", "MB"), floatfmt=".0f"))


if __name__ == "__main__":
    main()
