"""What a checkpoint of words computes: read from the files, unpacked bit by bit, run in float.

The engines of these layouts compute in fp16 or bf16, most of them on GPUs, so that the layout is
read here a second time, apart from how it was written.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fxquant.errors import ExportError
from fxquant.exports.check import Checked, unchecked, version
from fxquant.exports.half_scales import compared_in_half
from fxquant.exports.modules import Modules
from fxquant.files.doors import read_object
from fxquant.frontends.model_config import CONFIG
from fxquant.frontends.weight_files import safetensors_weights

# Slot of a word in which AWQ's kernels look for each of eight columns.
_SLOTS: Final = [0, 4, 1, 5, 2, 6, 3, 7]


def check(modules: Modules, folder: Path, layout: str, wanted: bool) -> Checked:
    gm = modules.gm
    said = unchecked(gm, wanted, ())
    if said is not None:
        return said
    name = f"{layout}'s layout, unpacked, in {version('transformers')}, float32"
    return compared_in_half(gm, _read(modules, folder), name, minima=False)


def _read(modules: Modules, folder: Path) -> PreTrainedModel:
    """The float model of the files."""
    config = read_object(folder / CONFIG)
    said = config["quantization_config"]
    stored = {name: value.read() for name, value in safetensors_weights(folder).items()}
    model = copy.deepcopy(modules.model)
    found = {}
    for name, value in stored.items():
        path, _, own = name.rpartition(".")
        if own == "qweight":
            parts = {key: stored[f"{path}.{key}"] for key in ("qweight", "qzeros", "scales")}
            unpack = _gptq if said["quant_method"] == "gptq" else _awq
            found[f"{path}.weight"] = unpack(parts, stored.get(f"{path}.g_idx"), said)
        elif own not in ("qzeros", "scales", "g_idx"):
            found[name] = value.float()
    model.load_state_dict(found, strict=False, assign=True)
    if config.get("tie_word_embeddings", True):
        model.tie_weights()
    return model.float().eval()


def _gptq(parts: dict[str, Tensor], groups: Tensor | None, said: dict[str, Any]) -> Tensor:
    assert groups is not None
    bits = said["bits"]
    codes = _numbers(parts["qweight"].t(), bits).T  # [K, N]
    zeros = _numbers(parts["qzeros"], bits) + (said["checkpoint_format"] == "gptq")
    at, size = groups.numpy(), said["group_size"]
    if not np.array_equal(at, np.arange(len(codes)) // (size if size > 0 else len(codes))):
        raise ExportError(f"gptq: nothing is written: g_idx is not in groups of {size} columns")
    return _weight(codes, zeros[at], parts["scales"].float().numpy()[at])


def _awq(parts: dict[str, Tensor], groups: Tensor | None, said: dict[str, Any]) -> Tensor:
    assert groups is None
    codes, zeros = (_in_order(_numbers(parts[key], 4)) for key in ("qweight", "qzeros"))
    size = said["group_size"] if said["group_size"] > 0 else len(codes)
    scales = parts["scales"].float().numpy()
    return _weight(codes, zeros.repeat(size, 0), scales.repeat(size, 0))


def _in_order(slots: Any) -> Any:
    return slots.reshape(len(slots), -1, 8)[..., _SLOTS].reshape(len(slots), -1)


def _weight(codes: Any, zeros: Any, scales: Any) -> Tensor:
    return torch.from_numpy(((codes - zeros) * scales).astype(np.float32).T.copy())


def _numbers(words: Tensor, bits: int) -> Any:
    """int32 [R, C], the numbers in words int32 [R, W], by the bits of their bytes."""
    rows = np.ascontiguousarray(words.numpy()).astype("<i4").view(np.uint8)
    stream = np.unpackbits(rows, axis=1, bitorder="little").reshape(len(rows), -1, bits)
    return (stream.astype(np.int32) * (1 << np.arange(bits, dtype=np.int32))).sum(-1)
