"""Why a loss in ONNX Runtime is not the graph's: codes at an edge, and how far they move it.

    python -m benchmarks.onnx_loss [--scheme w8a8-dynamic-token] [--seeds 4] [--windows 8]

The real model's loss over windows of 512 tokens of the built-in text: of the graph, of ONNX
Runtime, and of the graph on the runtime's codes, where nothing but rounding is left. Then of the
graph whose quantizers read inputs off by one rounding of float32 (x (1 + 2^-24 n), n normal): the
spread that any engine has which rounds elsewhere. Keeps the result in benchmarks/onnx_loss.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from tqdm import tqdm

import fxquant
from benchmarks.machine import processor
from benchmarks.memory import MODEL
from benchmarks.onnx_speed import LENGTH, exported
from fxquant.evaluation.models import versions
from fxquant.exports.onnx_check import Shown
from fxquant.exports.onnx_names import ZERO_POINT, kind_of
from fxquant.files.whole_file import write_text
from fxquant.ir.operands import operands
from fxquant.run.execution import Executor, OnNode
from fxquant.run.loss import token_nll

KEPT = Path(__file__).parent / "onnx_loss.json"


def noisy(seed: int, inputs: set[Node]) -> OnNode:
    generator = torch.Generator().manual_seed(seed)

    def on_node(node: Node, value: Any) -> Any:
        if node not in inputs:
            return value
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64) * 2.0**-24
        return (value.double() * (1 + noise)).float()

    return on_node


def measured(shown: Shown, windows: Tensor, seeds: int) -> dict[str, Any]:
    runs, codes = Executor(shown.graph), shown.codes
    coders = [node for node in codes if kind_of(node) != ZERO_POINT]
    inputs = {operands(node).x for node in coders}
    apart, count = 0, 0

    def of_graph(ids: Tensor, on_node: OnNode | None) -> float:
        logits = runs.run(on_node, input_ids=ids, attention_mask=torch.ones_like(ids))
        return float(token_nll(logits, ids).mean())

    losses: dict[str, list[float]] = {"graph": [], "engine": [], "graph on its codes": []}
    losses |= {f"noise {seed}": [] for seed in range(seeds)}
    noises: dict[str, Callable[..., Any]] = {
        f"noise {seed}": noisy(seed, inputs) for seed in range(seeds)
    }
    for window in tqdm(windows, disable=None):
        ids = window[None]
        logits, theirs = shown.run(ids, torch.ones_like(ids))
        own: dict[Node, Tensor] = {}

        def keep(node: Node, value: Any, own: dict[Node, Tensor] = own) -> Any:
            if node in codes:
                own[node] = value
            return value

        def take(node: Node, value: Any, theirs: dict[Node, Tensor] = theirs) -> Any:
            return theirs[node].to(value.dtype) if node in codes else value

        losses["graph"].append(of_graph(ids, keep))
        apart += sum(int((theirs[node] != own[node]).sum()) for node in coders)
        count += sum(own[node].numel() for node in coders)
        losses["engine"].append(float(token_nll(logits, ids).mean()))
        losses["graph on its codes"].append(of_graph(ids, take))
        for name, noise in noises.items():
            losses[name].append(of_graph(ids, noise))
    means = {name: statistics.fmean(each) for name, each in losses.items()}
    return {"codes": count, "codes apart": apart, "losses": means}


def said(found: dict[str, Any]) -> str:
    """The figures as docs/exports.md has them."""
    losses = found["losses"]
    base = losses["graph"]
    moved = [loss - base for name, loss in losses.items() if name.startswith("noise")]
    return (
        f"{found['scheme']} on {found['model']}, {found['windows']} x {LENGTH} tokens: the graph's "
        f"loss is {base:.4f}, the engine's {losses['engine'] - base:+.4f} from it; on the engine's "
        f"codes the graph's is {losses['graph on its codes'] - losses['engine']:+.1e} from the "
        f"engine's. {100 * found['codes apart'] / found['codes']:.2f}% of {found['codes']} codes "
        f"differ. {len(moved)} draws of noise move the graph's own loss by {min(moved):+.4f} to "
        f"{max(moved):+.4f}, by {statistics.stdev(moved):.4f} in standard deviation"
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="w8a8-dynamic-token")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args()
    loaded = fxquant.load_model(MODEL)
    windows = fxquant.windows(
        "builtin", loaded.tokenizer, count=options.windows, length=LENGTH
    ).evaluation
    graph = fxquant.convert(loaded.model, options.scheme, level="integer")
    with tempfile.TemporaryDirectory() as folder:
        shown = Shown(graph, exported(graph, None, Path(folder) / "export"))
        found = measured(shown, windows, options.seeds)
    asked = {"scheme": options.scheme, "model": MODEL, "windows": options.windows}
    kept = {**asked, **found, "processor": processor(), "versions": versions()}
    write_text(KEPT, json.dumps(kept, indent=1) + "\n")
    print(said(kept))


if __name__ == "__main__":
    main()
