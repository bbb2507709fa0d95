"""CPU time of converting decoder blocks to FP8 beside int8, A B A B in one run.

    python -m benchmarks.convert_cost [--rounds 9]

The blocks have SmolLM2-135M's shapes and random weights; the vocabulary is small, so that little
but blocks is converted. FP8 and int8 stand side by side with ranges of the same kind. Writes
benchmarks/convert_cost.json, of which docs/formats_measured.md has a sentence.
"""

from __future__ import annotations

import argparse
import functools
import json
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.fx import GraphModule

import fxquant
from benchmarks import machine
from benchmarks.subjects import ROOT
from benchmarks.timing import Step, clock, interleaved
from fxquant.evaluation.models import versions
from fxquant.files.whole_file import write_text

DATA = ROOT / "benchmarks" / "convert_cost.json"
PAIRS = {"fp8": "w8a8-dynamic-token", "fp8-static": "w8a8-static:absmax"}
BLOCKS, VOCABULARY, WINDOWS, LENGTH = 4, 1000, 2, 256


def blocks() -> GraphModule:
    """Decoder blocks of SmolLM2-135M's shapes, traced."""
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=BLOCKS,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return fxquant.trace(hf.LlamaForCausalLM(config).eval())


def measure(graph: GraphModule, windows: list[Tensor], rounds: int) -> dict[str, dict[str, Any]]:
    """By FP8's scheme: seconds of a block of it and of int8, and their ratio."""
    found: dict[str, dict[str, Any]] = {}
    for ours, base in PAIRS.items():
        steps: dict[str, Step] = {
            scheme: functools.partial(
                fxquant.convert, graph, scheme, calibration=windows if "static" in scheme else None
            )
            for scheme in (base, ours)
        }
        seconds = interleaved(steps, rounds)
        found[ours] = {
            "beside": base,
            "seconds": seconds[ours] / BLOCKS,
            "seconds_beside": seconds[base] / BLOCKS,
            "ratio": seconds[ours] / seconds[base],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    graph = blocks()
    windows = [torch.randint(VOCABULARY, (1, LENGTH)) for _ in range(WINDOWS)]
    data = {
        **machine.description(),
        "blocks": BLOCKS,
        "calibration": [WINDOWS, LENGTH],
        "rounds": rounds,
        "clock": clock(),
        "versions": versions(),
        "schemes": measure(graph, windows, rounds),
    }
    write_text(DATA, json.dumps(data, indent=1) + "\n")
    print(json.dumps(data["schemes"], indent=1))


if __name__ == "__main__":
    main()
