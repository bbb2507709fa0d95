"""Checkpoints as older transformers wrote them: pytorch_model*.bin, of which 5 writes none."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel


def save_pickled(model: PreTrainedModel, folder: Path, shard_bytes: int = 2**30) -> None:
    """``model.save_pretrained`` with pickles for weights, in shards of at most ``shard_bytes``
    and an index where there are several; a tied weight lies under both of its names."""
    model.save_pretrained(folder)
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
        path.unlink()
    shards = _shards(model.state_dict(), shard_bytes)
    if len(shards) == 1:
        torch.save(shards[0], folder / "pytorch_model.bin")
        return
    files = [f"pytorch_model-{i + 1:05}-of-{len(shards):05}.bin" for i in range(len(shards))]
    index = {}
    for file, shard in zip(files, shards, strict=True):
        torch.save(shard, folder / file)
        index.update(dict.fromkeys(shard, file))
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "pytorch_model.bin.index.json").write_text(text)


def _shards(state: dict[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    for name, value in state.items():
        held = sum(each.nbytes for each in shards[-1].values())
        if shards[-1] and held + value.nbytes > most:
            shards.append({})
        shards[-1][name] = value.clone()  # not the memory of what it is a view of
    return shards
