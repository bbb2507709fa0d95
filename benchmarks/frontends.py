"""The two front ends beside each other: seconds to trace 24 layers, and the graphs' speed.

python -m benchmarks.frontends

Random weights; a time is the least of several, the two graphs in turns.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch
import transformers as hf

import fxquant
from fxquant.frontends.tracing import HAS_TRACER

LAYERS, HIDDEN, TOKENS, REPEATS = 24, 256, 256, 7


def model() -> hf.PreTrainedModel:
    config = hf.LlamaConfig(
        vocab_size=1000,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config).eval()


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    llama, ids = model(), torch.randint(1000, (1, TOKENS))
    graphs = {}
    for name in (*(("hf",) if HAS_TRACER else ()), "recorder"):
        least = min(seconds(lambda n=name: fxquant.trace(llama, frontend=n)) for _ in range(3))  # type: ignore[misc]
        graphs[name] = fxquant.trace(llama, frontend=name)
        print(f"{name}: {least:.2f} s to trace {LAYERS} layers and compare them with the model")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(REPEATS):
        for name, graph in graphs.items():
            times[name].append(seconds(lambda g=graph: g(ids)))  # type: ignore[misc]
    for name, each in times.items():
        print(f"{name}: {1000 * min(each):.1f} ms a forward of {TOKENS} tokens")
    if len(times) == 2:
        print(f"recorder / hf: {min(times['recorder']) / min(times['hf']):.3f}")
    print(
        f"Llama, {LAYERS} layers, hidden {HIDDEN}; torch {torch.__version__}, transformers "
        f"{hf.__version__}, {torch.get_num_threads()} thread(s), {platform.machine()}"
    )


if __name__ == "__main__":
    main()
