"""Safetensors files as ``save_pretrained`` writes them, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fxquant.frontends.weight_files import INDEX, WEIGHTS

LIMIT = 2**31  # bytes of a shard, which is what is held in memory


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int = LIMIT) -> None:
    """Write ``tensors`` to model.safetensors, or to shards with their index where they exceed
    ``limit`` bytes; no more than a shard of them is held."""
    files: list[tuple[Path, list[str]]] = []
    total, size, held = 0, 0, dict[str, Tensor]()

    def flush() -> None:
        path = folder / f"shard-{len(files)}"
        save_file(held, path, metadata={"format": "pt"})
        files.append((path, list(held)))
        held.clear()

    for name, value in tensors:
        bytes_of = value.numel() * value.element_size()
        if held and size + bytes_of > limit:
            flush()
            size = 0
        held[name] = value.contiguous()
        size, total = size + bytes_of, total + bytes_of
    flush()
    if len(files) == 1:
        files[0][0].rename(folder / WEIGHTS)
        return
    places: dict[str, str] = {}
    for number, (path, names) in enumerate(files, 1):
        final = f"model-{number:05}-of-{len(files):05}.safetensors"
        path.rename(folder / final)
        places |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
