"""Speed and memory on this machine's CPU, as ratios measured in one run.

    python -m benchmarks.speed [--rounds 7] [--no-compile] [--held-to-avx2]

Each candidate alternates with an eager model (A B A B ...), so that a slow spell of the machine
hits both; a ratio is that of medians. Writes one file for this machine into benchmarks/machines;
the README's table has a column for each. Measure alone. ``--held-to-avx2``: torch's libraries are
told to use no more than AVX2, which says what the code does without the int8 instructions, on this
processor; a processor that has no more is another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import fxquant
from benchmarks import machine, main_job
from benchmarks.fake_quant import swap_linears
from benchmarks.memory import MODEL
from benchmarks.timing import Step, clock, interleaved, ratios_to
from fxquant.evaluation.data import cut_windows, load_text
from fxquant.evaluation.models import load_model, versions
from fxquant.evaluation.token_windows import Windows
from fxquant.run.regional import compiled_blocks

LENGTH = 512
RESULTS = Path(__file__).parent / "machines"
EAGER = "float model, eager"


def memory() -> dict[str, int]:
    """Bytes of float model, codes and convert's peak growth, in a process of its own."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-m", "benchmarks.memory"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def called(module: Callable[..., Any], ids: Tensor) -> Step:
    """One forward of a model, a graph or a compiled one."""
    more = {"use_cache": False} if hasattr(module, "config") else {}
    return lambda: module(input_ids=ids, **more)


def forwards(model: nn.Module, ids: Tensor, calibration: Tensor) -> dict[str, Step]:
    """The float model, its graph, quantized graphs and a float fake-quant module swap."""
    modules: dict[str, Callable[..., Any]] = {EAGER: model, "float graph": fxquant.trace(model)}
    for scheme in ("w8a8-dynamic-token", "w8a8-static:absmax", "w8", "w4-g128"):
        for level in ("integer", "kernels"):
            modules[f"{scheme} graph" + (", kernels" if level == "kernels" else "")] = (
                fxquant.convert(model, scheme, calibration=[calibration], level=level)
            )
    modules["fake-quant module swap"] = swap_linears(model)
    return {name: called(module, ids) for name, module in modules.items()}


def in_bfloat16(ids: Tensor, with_compiler: bool) -> dict[str, Step]:
    """The model in bfloat16, and its quantized graph, with compiled blocks too."""
    model = load_model(MODEL, dtype="bfloat16").model
    modules: dict[str, Callable[..., Any]] = {EAGER: model}
    for level in ("integer", "kernels"):
        name = "w8a8-dynamic-token graph" + (", kernels" if level == "kernels" else "")
        modules[name] = fxquant.convert(model, "w8a8-dynamic-token", level=level)
    if with_compiler:
        graph = fxquant.convert(model, "w8a8-dynamic-token")
        modules["w8a8-dynamic-token graph, compiled blocks"] = compiled_blocks(graph)
    return {name: called(module, ids) for name, module in modules.items()}


def compiled(model: nn.Module, ids: Tensor, rounds: int) -> tuple[dict[str, float], float]:
    """Graphs with compiled blocks, against the eager model; the longest first call in seconds,
    with no code of an earlier process to take."""
    steps, longest = {EAGER: called(model, ids)}, 0.0
    for name, scheme in (("w8a8-dynamic-token graph", "w8a8-dynamic-token"), ("float graph", "fp")):
        step = called(compiled_blocks(fxquant.convert(model, scheme)), ids)
        started = time.perf_counter()
        with fresh_cache():
            step()
        longest = max(longest, time.perf_counter() - started)
        steps[f"{name}, compiled blocks"] = step
    return ratios_to(EAGER, steps, rounds), longest


def conversions(model: nn.Module, ids: Tensor, calibration: Tensor) -> dict[str, Step]:
    """The cost of convert, and of calibration alone, beside one forward of a window."""
    batches = list(calibration.split(1))
    graph = fxquant.trace(model)

    def observe(count: int) -> Step:
        return lambda: fxquant.convert(
            graph, "w8a8-static:absmax", calibration=batches[:count], level="observed"
        )

    return {
        "one forward": called(model, ids),
        "convert w8a8-dynamic-token": lambda: fxquant.convert(model, "w8a8-dynamic-token"),
        "observe 1 window": observe(1),
        f"observe {len(batches)} windows": observe(len(batches)),
    }


def ratios(
    model: nn.Module, windows: Windows, rounds: int, with_compiler: bool
) -> dict[str, float]:
    """Of forwards, in float32 and bfloat16, of the main job, convert and calibration."""
    ids, calibration = windows.evaluation[:1], windows.calibration
    found = ratios_to(EAGER, forwards(model, ids, calibration), rounds)
    in_bf16 = ratios_to(EAGER, in_bfloat16(ids, with_compiler), rounds)
    found |= {f"bfloat16: {name}": ratio for name, ratio in in_bf16.items()}
    job = main_job.ratios(model, windows.evaluation, calibration, rounds)
    found |= {f"evaluate / forwards, {name}": ratio for name, ratio in job.items()}
    work = interleaved(conversions(model, ids, calibration), max(3, rounds // 2))
    extra = len(calibration) - 1
    observed = work[f"observe {len(calibration)} windows"] - work["observe 1 window"]
    forward = work["one forward"]
    found["convert w8a8-dynamic-token / forward"] = work["convert w8a8-dynamic-token"] / forward
    found["calibration per window / forward"] = observed / extra / forward
    return found | {"seconds of one forward": forward}


@torch.no_grad()
def measure(rounds: int, with_compiler: bool) -> dict[str, Any]:
    loaded = load_model(MODEL)
    windows = cut_windows(
        load_text("builtin"), loaded.tokenizer, count=4, length=LENGTH, calibration=5, seed=0
    )
    bytes_of = memory()
    size, codes, grown = bytes_of.values()
    found: dict[str, float] = {}
    seconds: dict[str, float] = {}
    if with_compiler:  # before anything else is compiled
        found, longest = compiled(loaded.model, windows.evaluation[:1], rounds)
        seconds["first call of compiled blocks, the longest"] = longest
    found |= ratios(loaded.model, windows, rounds, with_compiler)
    seconds["one forward"] = found.pop("seconds of one forward")
    found["peak memory of convert / (float + codes)"] = (size + grown) / (size + codes)
    return {
        **machine.description(),
        "model": MODEL,
        "revision": loaded.revision,
        "length": LENGTH,
        "rounds": rounds,
        "clock": clock(),
        "versions": versions(),
        "seconds": seconds,
        "ratios": found,
        "megabytes": {name: value / 1e6 for name, value in bytes_of.items()},
    }


def file_of(data: dict[str, Any]) -> Path:
    """Of this machine, these threads, and what it was held to."""
    words = (data["processor"], *data["features"], *data["held"].values(), str(data["threads"]))
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-") + ".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--held-to-avx2", action="store_true")
    options = parser.parse_args()
    if options.held_to_avx2 and not machine.HELD_TO_AVX2.items() <= os.environ.items():
        # The libraries have read their environment by now.
        again = [sys.executable, "-m", "benchmarks.speed", *sys.argv[1:]]
        sys.exit(subprocess.call(again, env={**os.environ, **machine.HELD_TO_AVX2}))
    result = measure(options.rounds, not options.no_compile)
    file = file_of(result)
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(tabulate(result["ratios"].items(), ("measured", "ratio"), floatfmt=".3f"))
    print(tabulate(result["seconds"].items(), ("seconds", "s"), floatfmt=".2f"))
    print(tabulate(result["megabytes"].items(), ("memory", "MB"), floatfmt=".0f"))
    print(f"written: {file.name}")


if __name__ == "__main__":
    main()
