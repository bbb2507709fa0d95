"""Memory of a streamed export of 1.3B shapes, beside the shard that it writes.

    python -m benchmarks.export_memory

Writes a random fp16 model (Llama's blocks at OPT-1.3B's width, 2.7 GB) to a temporary folder, and
deletes it afterwards. Each export runs in a process of its own, streamed, without the check, which
would load the whole model. Its memory is the peak of private pages (RssAnon), looked at every 10
ms; the weight files are mapped and count as page cache only. What a process takes before it exports
is that of the same export of a model of two narrow blocks. Writes
benchmarks/export_memory.json, which docs/exports.md names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxquant
from benchmarks import machine
from benchmarks.streaming import write_random
from benchmarks.subjects import ROOT
from fxquant.evaluation.models import versions
from fxquant.exports.table import FORMATS
from fxquant.files.whole_file import write_text
from fxquant.frontends.streaming import stream
from fxquant.ir.graph import set_workspace
from fxquant.ir.streamed import Workspace, workspace_folder

DATA: Final = ROOT / "benchmarks" / "export_memory.json"
EXPORTS: Final = (
    ("compressed-tensors", "w4-g128"),
    ("compressed-tensors", "w8"),
    ("gptq", "w4-g128-fp16"),
    ("awq", "w4-g128-fp16-asym"),
    ("gguf", "w4-g32-fp16"),
)


def llama(width: int, inner: int, layers: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        tie_word_embeddings=True,
    )


def peak(source: Path, output: Path, target: str, scheme: str) -> tuple[int, float]:
    """Bytes of private memory at most, and seconds, of one export."""
    command = [sys.executable, "-m", "benchmarks.export_memory", target, scheme]
    command += [str(source), str(output)]
    # glibc otherwise keeps freed blocks of up to 32 MB in its heap.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    started, most = time.perf_counter(), 0
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        while process.poll() is None:
            most = max(most, _private(process.pid))
            time.sleep(0.01)
        if process.returncode:
            assert process.stderr is not None
            raise SystemExit(f"{target} {scheme} failed:\n{process.stderr.read()[-2000:]}")
    return most, time.perf_counter() - started


def _private(pid: int) -> int:
    """Bytes; 0 where the process has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = dict(line.split(":") for line in text.splitlines())
    return int(lines.get("RssAnon", "0").split()[0]) * 1024


def export(target: str, scheme: str, source: Path, output: Path) -> None:
    """In this process."""
    with workspace_folder() as workspace:
        graph = fxquant.trace(stream(source, dtype=torch.float16))
        set_workspace(graph, Workspace(workspace))
        quantized = fxquant.convert(graph, scheme, level=FORMATS[target].target.level)
        FORMATS[target].export(quantized, output, check=False)


def measure(folder: Path, small: Path, target: str, scheme: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder.parent) as written:
        first, _ = peak(small, Path(written) / "small", target, scheme)
        most, seconds = peak(folder, Path(written) / "large", target, scheme)
        files = [path for path in Path(written, "large").rglob("*") if path.is_file()]
        shard = max(path.stat().st_size for path in files)
    return {
        "target": target,
        "scheme": scheme,
        "shard_bytes": shard,
        "peak_bytes": most,
        "before_bytes": first,
        "beside_shard": round((most - first) / shard, 3),
        "seconds": round(seconds, 1),
    }


def said(found: dict[str, Any]) -> str:
    """The sentence of docs/exports.md."""
    shares = []
    for row in found["rows"]:
        share, size = row["beside_shard"], row["shard_bytes"] / 1e9
        shares.append(f"{row['target']} {row['scheme']} {share:.2f} ({size:.2f})")
    return f"private memory at most, as a share of the file written (in GB): {', '.join(shares)}"


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        large, small = Path(temporary, "large"), Path(temporary, "small")
        for folder, config in (
            (large, llama(2048, 5632, 24, 50272)),
            (small, llama(128, 256, 2, 1000)),
        ):
            folder.mkdir()
            write_random(LlamaForCausalLM, config, folder)
        for target, scheme in EXPORTS:
            rows.append(measure(large, small, target, scheme))
            print(json.dumps(rows[-1]), flush=True)
    found = {"rows": rows, "versions": versions(), **machine.description()}
    write_text(DATA, json.dumps(found, indent=2) + "\n")
    print(said(found))


if __name__ == "__main__":
    if sys.argv[1:]:
        export(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
