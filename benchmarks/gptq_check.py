"""Folders of GPTQ and AWQ in GPTQModel, on the CPU: each weight bit for bit, and the logits.

    make gptq-check

Its engines compute in fp16. A weight is read through the engine's own product, of the rows of the
identity, and has to be the graph's, rounded to fp16. Logits stand beside the graph's, in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from tabulate import tabulate
from tokenizers import pre_tokenizers
from torch import Tensor
from torch.fx import GraphModule
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fxquant
from benchmarks.machine import processor
from fxquant.evaluation.models import versions
from fxquant.exports import awq, gptq
from fxquant.exports.sites import coded_sites
from tests.architectures import build, randomize
from tests.test_export_gguf import trained

TRIED: Final[tuple[tuple[Callable[..., Any], str, str], ...]] = (
    (gptq, "w4-g32-fp16", "gptq_torch"),
    (gptq, "w4-g32-fp16-asym", "gptq_torch"),
    (gptq, "w8-g32-fp16", "gptq_torch"),
    (gptq, "w4-g64-fp16+gptq", "gptq_torch"),
    (awq, "w4-g32-fp16", "awq_torch"),
    (awq, "w4-g32-fp16-asym+awq", "awq_torch"),
)


def subject() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=384, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = build(LlamaForCausalLM, config)
    randomize(model, 3)
    return model


def check_weights(graph: GraphModule, engine: Any) -> int:
    """How many weights the engine reads as the graph's in fp16; RuntimeError where one is not."""
    sites = list(coded_sites(graph))
    for site in sites:
        module = engine.get_submodule(site.path)
        read = module(torch.eye(site.site.shape[1], dtype=torch.float16)).T
        if not torch.equal(read, site.codes().dequantize().half()):
            raise RuntimeError(f"{site.path}: {type(module).__name__} reads another weight")
    return len(sites)


def tried(model: PreTrainedModel, write: Any, scheme: str, backend: str, ids: Tensor) -> list[str]:
    from gptqmodel import BACKEND, GPTQModel

    graph = fxquant.convert(model, scheme, calibration=[ids])
    tokenizer = trained("Ġ", pre_tokenizers.ByteLevel(add_prefix_space=False))  # it asks for one
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export"
        write(graph, path, tokenizer=tokenizer)
        loaded = GPTQModel.load(
            str(path), backend=BACKEND(backend), device="cpu", dtype=torch.float16
        )
        engine = loaded.model
        count = check_weights(graph, engine)
        theirs = engine(input_ids=ids, use_cache=False).logits.float()
    ours = graph(input_ids=ids, attention_mask=torch.ones_like(ids))
    kernel = type(engine.get_submodule(next(coded_sites(graph)).path)).__name__
    apart, largest = float((theirs - ours).abs().max()), float(ours.abs().max())
    return [write.__name__, scheme, kernel, str(count), f"{apart:.2g}", f"{largest:.3g}"]


@torch.no_grad()
def main() -> None:
    model = subject()
    ids = torch.randint(0, 384, (2, 48), generator=torch.Generator().manual_seed(0))
    rows = [tried(model, *each, ids) for each in TRIED]
    headers = ["layout", "scheme", "engine", "weights bit for bit"]
    headers += ["a logit off the graph's", "the largest"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
    print(
        f"A Llama of random weights, {ids.numel()} tokens; gptqmodel {version('gptqmodel')}, "
        f"{', '.join(f'{name} {number}' for name, number in versions().items())}; {processor()}"
    )


if __name__ == "__main__":
    main()
