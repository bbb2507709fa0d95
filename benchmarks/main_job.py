"""What ``evaluate`` costs beside its graph's forwards, on the same windows.

    python -m benchmarks.main_job [--windows 4] [--rounds 7]

The losses, what the quantizers clip and the check for NaN are what may come on top. The graph's own
call writes all logits, which the loss need not have, so a ratio may be below 1.
"""

from __future__ import annotations

import argparse

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxquant
from benchmarks.memory import MODEL
from benchmarks.timing import Step, interleaved
from fxquant.evaluation.data import cut_windows, load_text
from fxquant.evaluation.models import load_model
from fxquant.evaluation.perplexity import evaluate

LENGTH = 512
SCHEMES = ("fp", "w8a8-dynamic-token", "w8a8-dynamic-token-asym", "w8a8-static:absmax")


@torch.no_grad()
def ratios(model: nn.Module, windows: Tensor, calibration: Tensor, rounds: int) -> dict[str, float]:
    """By scheme: seconds of ``evaluate`` over those of its graph's forwards, A B A B."""
    found = {}
    for scheme in SCHEMES:
        graph = fxquant.convert(model, scheme, calibration=list(calibration.split(1)))

        def forwards(graph: torch.fx.GraphModule = graph) -> None:
            for ids in windows.split(1):
                graph(input_ids=ids)

        def job(graph: torch.fx.GraphModule = graph) -> object:
            return evaluate(graph, windows)

        steps: dict[str, Step] = {"forwards": forwards, "evaluate": job}
        seconds = interleaved(steps, rounds)
        found[scheme] = seconds["evaluate"] / seconds["forwards"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    loaded = load_model(MODEL)
    cut = cut_windows(
        *(load_text("builtin"), loaded.tokenizer),
        count=options.windows,
        length=LENGTH,
        calibration=2,
        seed=0,
    )
    found = ratios(loaded.model, cut.evaluation, cut.calibration, options.rounds)
    print(f"{MODEL}, {options.windows} windows of {LENGTH}, {torch.get_num_threads()} threads")
    print(tabulate(found.items(), ("scheme", "evaluate / forwards"), floatfmt=".3f"))


if __name__ == "__main__":
    main()
