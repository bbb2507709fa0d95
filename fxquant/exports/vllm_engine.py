"""vLLM as an engine that scores windows, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor

from fxquant.errors import ExportError
from fxquant.exports.joined import joined_to
from fxquant.files.doors import printable, read_object
from fxquant.frontends.model_config import CONFIG

SETTING: Final = "float32, float16 where integers of weights alone are packed; eager"
_PROGRAM: Final = Path(__file__).parent / "vllm_process.py"
# What is not set already: vLLM in the one process, on its threads; a cache of keys and values in
# GiB on a CPU, of which it takes half of the machine's memory elsewise; and what it would tell.
_SURROUNDINGS: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_OPTIONS: Final = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": -1,  # as much of the model's as its cache holds
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,  # of which all logits are held at once
    "use_tqdm_on_load": False,
    "disable_log_stats": True,
}
_WORDS: Final = 600


class Vllm:
    """A process that runs one export after another."""

    def __init__(self) -> None:
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        given = {**_SURROUNDINGS, **os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        self._process = subprocess.Popen(
            [sys.executable, str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=given,
        )
        weakref.finalize(self, _end, self._process)
        self._holds = 0

    def open(self, folder: Path) -> None:
        """Raises ExportError, in vLLM's words, where it does not load ``folder``, and where it
        would run linears that it joins by the spec of the first."""
        _check_joined(folder)
        asked = {"model": str(folder), "dtype": dtype_of(folder), **_OPTIONS}
        self._holds = self._answer({"open": asked}, f"does not load {folder}")["holds"]

    def losses(self, ids: Tensor) -> Tensor:
        """Nats float32 [batch, length - 1] of ids int64 [batch, length], all but each row's first.

        Raises ExportError where rows are longer than the engine holds, or it does not run them.
        """
        if ids.shape[1] >= self._holds:
            raise ExportError(
                f"runtime vllm holds {self._holds} tokens of this model, and one of them is its "
                f"answer: windows of {ids.shape[1]} are too long for it; give --length "
                f"{self._holds - 1} or less, or more memory for its cache (on a CPU "
                "VLLM_CPU_KVCACHE_SPACE, in GiB) where the model itself holds more"
            )
        return torch.tensor(self._answer({"score": ids.tolist()}, "does not run this")["losses"])

    def _answer(self, asked: dict[str, Any], fails: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ExportError(f"runtime vllm {fails}: its process ended{self._last_words()}")
        found: dict[str, Any] = json.loads(line)
        if "refused" in found:
            raise ExportError(f"runtime vllm {fails}: {printable(found['refused'])[:_WORDS]}")
        return found

    def _last_words(self) -> str:
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f" ({code}): {printable(lines[-1])[:_WORDS]}" if lines else f" ({code})"


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def opened(folder: Path) -> Vllm:
    engine = Vllm()
    engine.open(folder)
    return engine


def _check_joined(folder: Path) -> None:
    """vLLM says nothing where such linears are of several groups: it takes the first one's."""
    groups = _groups(folder)
    kinds = {path: name for name, group in groups.items() for path in group["targets"]}
    for path, kind in kinds.items():
        for other in joined_to(path):
            if kinds.get(other, kind) != kind:
                raise ExportError(
                    f"runtime vllm joins {path} and {other} into one linear, and would run both by "
                    "what is said of the first: give them one spec, or take --runtime transformers"
                )


def _groups(folder: Path) -> dict[str, Any]:
    """Groups of the config; none for what is no compressed-tensors export."""
    said = read_object(folder / CONFIG, ExportError).get("quantization_config", {})
    groups: dict[str, Any] = said.get("config_groups", {})
    return groups


def dtype_of(folder: Path) -> str:
    """What vLLM is to compute in: float32 but where its kernels do not."""
    groups = _groups(folder).values()
    packed = not groups or any(
        group["format"] == "pack-quantized" and group["input_activations"] is None
        for group in groups
    )
    return "float16" if packed else "float32"
