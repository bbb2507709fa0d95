"""Streaming, measured: OPT-1.3B's real shapes under a hard memory limit, and what streaming costs.

    python -m benchmarks.streaming limit     # every scheme, under the limit, on a random model
    python -m benchmarks.streaming cost      # streamed over in-memory time, where both fit

Both write what they print to benchmarks/streaming.json, each under its own name.

``limit`` writes a random fp16 model (2.6 GB) to a temporary folder and deletes it afterwards. Each
scheme runs in a process of its own under RLIMIT_DATA, which counts all private writable memory:
heap, anonymous mappings, copy-on-write mappings, whether touched or not. The weight files are
mapped shared and read-only, so they count as page cache only. MALLOC_MMAP_THRESHOLD_ is set to
1 MB: glibc would keep freed matrices in a fragmented heap.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, PretrainedConfig, PreTrainedModel

import fxquant
from fxquant.evaluation.models import versions
from fxquant.evaluation.perplexity import evaluate
from fxquant.frontends.pretrained import read_model
from fxquant.frontends.streaming import stream
from fxquant.ir.graph import set_workspace
from fxquant.ir.streamed import Workspace

SCHEMES = (
    "fp",
    "w8",
    "w8a8-dynamic",
    "w8a8-static:absmax",
    "w8a8-static:p99.9",
    "w8a8-static:absmax+smooth(alpha=0.5)",
    "w4-g128+gptq",
)
LIMIT = 2_500_000_000  # bytes above the activations
LENGTH, WINDOWS, CALIBRATION = 128, 4, 2


def opt_1_3b(layers: int = 24) -> OPTConfig:
    """facebook/opt-1.3b's config.json."""
    return OPTConfig(
        vocab_size=50272,
        hidden_size=2048,
        ffn_dim=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=2048,
        word_embed_proj_dim=2048,
    )


def write_random(kind: type[PreTrainedModel], config: PretrainedConfig, directory: Path) -> None:
    """Random fp16 weights, a shard a block, without ever holding the model."""
    with torch.device("meta"):
        model = kind(config)
    model.tie_weights()
    config.architectures, config.dtype = [kind.__name__], torch.float16
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, Tensor]] = {}
    places: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator) * 0.02
        gain = name.endswith("norm.weight")
        stored = (1 + value if gain else value).to(torch.float16)
        block = next((part for part in name.split(".") if part.isdigit()), "rest")
        places[name] = f"model-{block}.safetensors"
        shards.setdefault(places[name], {})[name] = stored
        for shard in [s for s in shards if s != f"model-{block}.safetensors" and "rest" not in s]:
            save_file(shards.pop(shard), directory / shard)
    for shard, tensors in shards.items():
        save_file(tensors, directory / shard)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    files = sorted(directory.glob("*.safetensors"))
    print(f"written: {sum(f.stat().st_size for f in files) / 1e9:.2f} GB in {len(files)} files")


def ids(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 50000, (count, LENGTH), generator=generator)


def activation_bytes(config: OPTConfig) -> int:
    """What lives beside the weights, at most: logits and their fp32 copy for the loss, the cuts
    of all windows, one block's scores and hidden states (fp32)."""
    logits = 3 * LENGTH * config.vocab_size
    cuts = 2 * max(WINDOWS, CALIBRATION) * LENGTH * config.hidden_size
    block = 2 * config.num_attention_heads * LENGTH**2 + 4 * LENGTH * config.ffn_dim
    return int(4 * (logits + cuts + block))


def run_limited(directory: Path, scheme: str) -> dict[str, Any]:
    """One scheme under the limit, in this process: loss, seconds, peak."""
    limit = LIMIT + activation_bytes(opt_1_3b())
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        graph = fxquant.trace(stream(directory, dtype=torch.float32))
        set_workspace(graph, Workspace(Path(folder)))
        calibration = ids(CALIBRATION, seed=1).split(1)
        quantized = fxquant.convert(graph, scheme, calibration=calibration)
        loss = evaluate(quantized, ids(WINDOWS, seed=2)).loss
    return {
        "scheme": scheme,
        "loss": loss,
        "seconds": round(time.perf_counter() - started, 1),
        "limit_gb": round(limit / 1e9, 3),
        "private_gb_at_end": round(_status("VmData") / 1e9, 3),
        "peak_resident_gb": round(_status("VmHWM") / 1e9, 3),  # pages of mapped files too
    }


def _status(name: str) -> int:
    """Bytes, from /proc."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def keep(name: str, rows: list[dict[str, Any]], layers: int) -> None:
    """Put one part's rows into the JSON file, in place of those of the same scheme.

    Earlier rows stay where they were measured in the same way; the other part stays.
    """
    file = Path(__file__).with_suffix(".json")
    parts = json.loads(file.read_text()) if file.exists() else {}
    setting = {
        "model": f"random, facebook/opt-1.3b's shapes, {layers} of 24 layers, fp16 on disk",
        "compute_dtype": "float32",
        "length": LENGTH,
        "windows": WINDOWS,
        "calibration_windows": CALIBRATION,
        "versions": versions(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    before = parts.get(name, {})
    alike = {k: v for k, v in before.items() if k != "rows"} == setting
    found = {row["scheme"]: row for row in [*(before["rows"] if alike else []), *rows]}
    parts[name] = {**setting, "rows": list(found.values())}
    file.write_text(json.dumps(parts, indent=2) + "\n")


def limit(schemes: list[str], layers: int) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_random(OPTForCausalLM, opt_1_3b(layers), Path(folder))
        for scheme in schemes:
            command = [sys.executable, "-m", "benchmarks.streaming", "one", folder, scheme]
            # glibc otherwise keeps freed blocks of up to 32 MB in its heap.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{scheme} failed under the limit:\n{done.stderr[-2000:]}")
            print(done.stdout.strip(), flush=True)
            rows.append(json.loads(done.stdout))
            keep("limit", rows, layers)


def cost(layers: int, repeats: int = 3) -> None:
    """Evaluation of the float and the W8A8 graph, streamed over in memory, alternating."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_random(OPTForCausalLM, opt_1_3b(layers), Path(folder))
        model = read_model(folder, dtype=torch.float32)
        graphs = [fxquant.trace(model), fxquant.trace(stream(folder, dtype=torch.float32))]
        for scheme in ("fp", "w8a8-dynamic"):
            pair = [fxquant.convert(graph, scheme) for graph in graphs]
            if scheme != "fp":
                fxquant.save(pair[1], Path(folder) / scheme)
                pair[1] = fxquant.load(Path(folder) / scheme, stream=True)
            seconds = [
                [evaluate(gm, ids(WINDOWS, seed=2)).seconds for gm in pair] for _ in range(repeats)
            ]
            best = [min(column) for column in zip(*seconds, strict=True)]
            ratio = round(best[1] / best[0], 3)
            rows.append({"scheme": scheme, "seconds": best, "streamed/in_memory": ratio})
            print(json.dumps(rows[-1]), flush=True)
    keep("cost", rows, layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("limit", "cost", "one"))
    parser.add_argument("rest", nargs="*", help="schemes of limit")
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    if options.what == "one":
        print(json.dumps(run_limited(Path(options.rest[0]), options.rest[1])))
    elif options.what == "limit":
        limit(options.rest or list(SCHEMES), options.layers or 24)
    else:
        cost(options.layers or 4)


if __name__ == "__main__":
    main()
