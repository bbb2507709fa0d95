"""Speed of exported models in ONNX Runtime against the eager float model, in one run.

    python -m benchmarks.onnx_speed [SCHEME ...] [--rounds 9] [--threads 2] [--nodes]

Each session alternates with the eager float forward (A B A B ...) on 1 x 512 tokens; a ratio is
that of medians, of CPU seconds with --threads 1. ``--nodes``: where the time goes, by operator.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from tabulate import tabulate
from torch import Tensor

import fxquant
from benchmarks.memory import MODEL
from benchmarks.timing import Step, clock, ratios_to
from fxquant.exports.onnx_check import EXACT, inputs_of, session
from fxquant.exports.onnx_file import MODEL as FILE

SCHEMES = ("w8a8-dynamic-token", "w8", "w4-g128")
LENGTH = 512


def exported(model: Any, scheme: str | None, folder: Path) -> Path:
    return fxquant.exports.onnx(model, folder, scheme=scheme, check=False).path / FILE


def measured(path: Path, base: Step, ids: Tensor, rounds: int) -> float:
    engine, given = session(path), inputs_of(ids, torch.ones_like(ids))
    steps: dict[str, Step] = {"float": base, "engine": lambda: engine.run(["logits"], given)}
    return ratios_to("float", steps, rounds)["engine"]


def by_operator(path: Path, ids: Tensor, rounds: int) -> str:
    """Milliseconds a forward of each kind of node, as the runtime's profiler has them."""
    with tempfile.TemporaryDirectory() as folder:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        for key, value in EXACT.items():
            settings.add_session_config_entry(key, value)
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "profile")
        engine = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        for _ in range(rounds):
            engine.run(["logits"], inputs_of(ids, torch.ones_like(ids)))
        events = json.loads(Path(engine.end_profiling()).read_text())
    taken: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            taken[event["args"]["op_name"]] += event["dur"]
            count[event["args"]["op_name"]] += 1
    rows = [(k, count[k] // rounds, v / rounds / 1000) for k, v in taken.most_common(20)]
    return tabulate(rows, ("operator", "nodes", "ms"), floatfmt=".2f")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nodes", action="store_true")
    parser.add_argument("--folder", type=Path, help="keeps the exports, or has them")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = fxquant.load_model(MODEL)
    ids = fxquant.windows("builtin", loaded.tokenizer, count=1, length=LENGTH).evaluation
    with tempfile.TemporaryDirectory() as own, torch.no_grad():
        folder = options.folder or Path(own)
        for scheme in options.schemes:
            path = folder / scheme / FILE
            if not path.exists():
                path = exported(loaded.model, scheme, folder / scheme)
            if options.nodes:
                print(f"{scheme}\n{by_operator(path, ids, options.rounds)}", flush=True)
                continue
            found = measured(path, lambda: loaded.model(ids), ids, options.rounds)
            print(f"{scheme}: {found:.3f} of eager float in {clock()} seconds", flush=True)


if __name__ == "__main__":
    main()
