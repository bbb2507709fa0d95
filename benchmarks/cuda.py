"""Fused levels on a CUDA device: GEMMs, forwards of OPT-1.3B's shapes, and the main job.

    python -m benchmarks.cuda [--output FILE.json] [--model NAME] [--minutes 5]
    python -m benchmarks.cuda --dry-run    the same steps, tiny, on the CPU: no figures

Writes JSON after each step: what was measured, on what, and what was skipped and why. A step that
would begin after ``--minutes`` is skipped and listed. Each candidate alternates with eager fp16,
and a ratio is that of medians. ``python -m benchmarks.readme_tables`` then writes README's table.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

import fxquant
from benchmarks.cuda_peers import PEERS, MissingPeer, prepared
from benchmarks.cuda_table import page_table
from benchmarks.memory import MODEL
from benchmarks.timing import Step, interleaved
from fxquant.errors import FxquantError
from fxquant.evaluation.data import cut_windows, load_text
from fxquant.evaluation.models import load_model, versions
from fxquant.evaluation.perplexity import evaluate
from fxquant.files.whole_file import write_text
from fxquant.numerics.kernels import cuda as kernels
from fxquant.numerics.kernels.table import implementation
from fxquant.run.probe import relative_difference
from fxquant.run.replay import why_not

SCHEMES = (
    *("fp", "w8a8-static:absmax", "w8a8-dynamic-token", "w8a8-dynamic", "w8", "w4-g128"),
    *("w4-g128/a8-dynamic-token", "fp8", "fp8-static"),
)
LEVELS = ("integer", "kernels")
INEXACT = "kernels-inexact"
JOBS = ("fp", "w8a8-dynamic-token", "fp8")  # of the real model


@dataclass(frozen=True)
class Size:
    """How much is measured: the real thing, or the dry run of a test."""

    device: str
    dtype: torch.dtype
    gemms: tuple[tuple[int, int, int], ...]
    hidden: int
    layers: int
    vocabulary: int
    batches: tuple[int, ...]
    length: int
    windows: int
    rounds: int


REAL = Size(
    device="cuda",
    dtype=torch.float16,
    gemms=((2048, 2048, 2048), (2048, 2048, 8192), (2048, 8192, 2048), (8192, 8192, 8192)),
    hidden=2048,
    layers=24,
    vocabulary=50272,
    batches=(1, 4),
    length=2048,
    windows=64,
    rounds=7,
)
TINY = Size("cpu", torch.float32, ((17, 64, 32),), 64, 1, 96, (1,), 16, windows=2, rounds=1)


def levels_of(scheme: str) -> tuple[str, ...]:
    """Where FP8 codes are multiplied, also the level at which the device does so itself."""
    return (*LEVELS, INEXACT) if "fp8" in scheme else LEVELS


@dataclass
class Report:
    """What is known so far; ``skipped``: step by reason; ``keep`` is called after each step."""

    until: float
    keep: Callable[[Report], None] = field(default=lambda _: None)
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def step(self, name: str, measure: Callable[[], Any]) -> None:
        """Keep what ``measure`` finds, or why it was not measured."""
        if time.monotonic() > self.until:
            self.skipped[name] = "the time was up"
        else:
            try:
                self.figures[name] = measure()
            except (FxquantError, MissingPeer, torch.OutOfMemoryError) as error:
                self.skipped[name] = str(error)
        self.keep(self)


def timed(steps: dict[str, Step], size: Size) -> dict[str, float]:
    """Median milliseconds of each, waiting for the device."""

    def waiting(step: Step) -> Step:
        def run() -> None:
            step()
            if size.device == "cuda":
                torch.cuda.synchronize()

        return run

    found = interleaved({name: waiting(step) for name, step in steps.items()}, size.rounds)
    return {name: 1e3 * seconds for name, seconds in found.items()}


def gemm(size: Size, rows: int, length: int, columns: int) -> dict[str, float]:
    """One product in the model's dtype, by codes alone, and by the fused operators."""
    ops = torch.ops.fxquant
    x = torch.randn(rows, length, device=size.device, dtype=size.dtype)
    weight = torch.randint(-127, 128, (columns, length), device=size.device, dtype=torch.int8)
    dense, scale = weight.to(size.dtype), torch.rand(columns, 1, device=size.device)
    made = ops.quantize_rows(x, "token", True, -127, 127)
    rest = (None, None, None, None, made[3], 1024, False)
    steps: dict[str, Step] = {
        "float": lambda: torch.nn.functional.linear(x, dense),
        "int_gemm": lambda: ops.int_gemm(made[0], weight, 1024),
        "quantize_rows": lambda: ops.quantize_rows(x, "token", True, -127, 127),
        "int_linear": lambda: ops.int_linear(made[0], weight, made[1], scale, *rest),
    }
    return timed(steps | _fp8_steps(x, columns), size)


def _fp8_steps(x: Tensor, columns: int) -> dict[str, Step]:
    """The product in FP8 where the device multiplies it: the reference would take the time up."""
    ops = torch.ops.fxquant
    weight = torch.randn(columns, x.shape[1], device=x.device).to(torch.float8_e4m3fn)
    weight_scale = torch.rand(columns, 1, device=x.device)
    scale = ops.choose_scale(x, "token", "e4m3")
    codes = ops.quantize_to(x, scale, "e4m3", 0)
    call = (codes, weight, scale, weight_scale, None, x, "e4m3", "e4m3")
    if implementation("code_linear", *call) is None:
        return {}
    return {
        "quantize_to e4m3": lambda: ops.quantize_to(
            x, ops.choose_scale(x, "token", "e4m3"), "e4m3", 0
        ),
        "code_linear e4m3": lambda: ops.code_linear(*call),
    }


def opt_model(size: Size) -> OPTForCausalLM:
    """OPT-1.3B's shapes with random weights."""
    config = OPTConfig(
        hidden_size=size.hidden,
        word_embed_proj_dim=size.hidden,
        ffn_dim=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.hidden // 64),
        vocab_size=size.vocabulary,
        max_position_embeddings=size.length,
    )
    torch.manual_seed(0)
    model = OPTForCausalLM(config).eval().to(size.dtype).to(size.device)
    assert isinstance(model, OPTForCausalLM)
    return model


def forwards(model: OPTForCausalLM, scheme: str, size: Size) -> list[dict[str, Any]]:
    """A row for each batch: eager and the levels in ms, ratios to eager, and whether both exact
    levels give the same bits; of the one that is not, its logits' largest relative difference."""
    high = model.config.vocab_size
    batches = [torch.randint(3, high, (1, size.length), device=size.device) for _ in range(2)]
    graphs = {
        level: fxquant.convert(model, scheme, calibration=batches, level=level)
        for level in levels_of(scheme)
    }
    rows = []
    for batch in size.batches:
        ids = torch.randint(3, high, (batch, size.length), device=size.device)
        steps: dict[str, Step] = {"eager": partial(model, input_ids=ids, use_cache=False)}
        for level, graph in graphs.items():
            steps[level] = partial(graph, input_ids=ids)
        found = timed(steps, size)
        logits = {level: graph(input_ids=ids) for level, graph in graphs.items()}
        row: dict[str, Any] = {
            **{"scheme": scheme, "batch": batch, "length": size.length, "ms": found},
            "ratio": {level: found[level] / found["eager"] for level in graphs},
            "same bits": torch.equal(*(logits[level] for level in LEVELS)),
        }
        if INEXACT in logits:
            row["difference"] = relative_difference(logits["integer"], logits[INEXACT])
        rows.append(row)
    return rows


def peer(name: str, model: OPTForCausalLM, size: Size) -> list[dict[str, Any]]:
    """As ``forwards``, one batch, of another tool."""
    high = model.config.vocab_size
    ids = torch.randint(3, high, (size.batches[0], size.length), device=size.device)
    forward, seconds = prepared(name, model, ids)
    eager = partial(model, input_ids=ids, use_cache=False)
    found = timed({"eager": eager, "peer": partial(forward, ids)}, size)
    row: dict[str, Any] = {"scheme": name, "batch": size.batches[0], "length": size.length}
    row |= {"ms": found, "ratio": {"peer": found["peer"] / found["eager"]}}
    return [{**row, "seconds to the first result": seconds}]


def main_job(name: str, scheme: str, size: Size) -> dict[str, Any]:
    """Seconds of the evaluation at each level and replayed as a captured graph, and its loss, on
    the real model; the bits of the losses are compared."""
    loaded = load_model(name, dtype=str(size.dtype).removeprefix("torch."), device=size.device)
    length = min(1024, 16 * size.length)
    windows = cut_windows(
        load_text("builtin"),
        loaded.tokenizer,
        count=size.windows,
        length=length,
        calibration=0,
        seed=0,
    )
    found: dict[str, Any] = {"scheme": scheme, "windows": size.windows, "length": length}
    for level in levels_of(scheme):
        graph = fxquant.convert(loaded.model, scheme, level=level)
        evaluate(graph, windows.evaluation[:1], replay=False)  # kernels are compiled
        result = evaluate(graph, windows.evaluation, replay=False)
        found[level] = {"seconds": result.seconds, "loss": result.loss}
    if not why_not(graph):
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            replayed = evaluate(graph, windows.evaluation)
        found["replayed"] = {"seconds": replayed.seconds, "loss": replayed.loss}
        found["same bits"] = torch.equal(replayed.losses, result.losses)
        found["notes"] = [str(note.message) for note in notes]
    return found


@torch.no_grad()
def measure(
    size: Size,
    model_name: str,
    minutes: float,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Everything, in the order of what is wanted most; ``keep`` sees what there is each time."""
    device = torch.cuda.get_device_name() if size.device == "cuda" else platform.machine()

    def result(report: Report) -> dict[str, Any]:
        return {
            **{"device": device, "dtype": str(size.dtype), "rounds": size.rounds},
            **{"model": model_name, "versions": versions(), "dry_run": size is TINY},
            **{"figures": report.figures, "skipped": report.skipped},
        }

    report = Report(time.monotonic() + 60 * minutes, lambda report: keep(result(report)))
    missing = kernels.missing_library()
    if missing or size.device != "cuda":
        report.skipped["Triton's kernels"] = missing or "a dry run on the CPU"
    for shape in size.gemms:
        report.step("gemm " + "x".join(map(str, shape)), partial(gemm, size, *shape))
    model = opt_model(size)
    for scheme in SCHEMES:
        report.step(scheme, partial(forwards, model, scheme, size))
    for scheme in JOBS:
        report.step(f"evaluate {scheme}", partial(main_job, model_name, scheme, size))
    for name in PEERS:  # last: one of them compiles for a minute
        report.step(name, partial(peer, name, model, size))
    return result(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--model", default=MODEL, help="the real model of the main job")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, for a test")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry-run goes through the steps on the CPU")

    def keep(result: dict[str, Any]) -> None:
        write_text(options.output, json.dumps(result, indent=2) + "\n")

    size = TINY if options.dry_run else REAL
    result = measure(size, options.model, options.minutes, keep)
    keep(result)
    print(page_table(result))


if __name__ == "__main__":
    main()
