"""Models larger than memory: opened on meta, their weights left in the safetensors files.

``stream`` gives a model that trace, convert and evaluation take like any other. Each leaf is read
when it is used; ``run_batches`` takes all batches through one block after the other, so that a
block is read once for all of them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fxquant.blocks import block_starts
from fxquant.errors import CheckpointError, ModelError
from fxquant.execution import Executor, OnNode
from fxquant.patching import exclusive, parameters_on_meta
from fxquant.streamed import Source, Streamed, restream
from fxquant.tensor_file import TensorFile

INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model*.bin"


def stream(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str | None = None,
) -> PreTrainedModel:
    """Open what ``save_pretrained`` wrote to ``directory`` without reading the weights.

    Args:
        dtype: what weights become when they are read; None: as the config or the files have it.
        device: where they are read to.
        attention: the attention implementation, as from_pretrained's attn_implementation.

    Returns the model in eval mode, its parameters on meta; calling it or its graph reads each
    leaf when it is needed. It cannot be moved, cast or trained. While it is built in half
    precision, torch's default dtype is that one in all threads, as in transformers' own loading.

    Raises ModelError: no safetensors files there, weights that are missing or of another shape.
    """
    directory, device = Path(directory), torch.device(device)
    files = _weight_files(directory)
    config = AutoConfig.from_pretrained(directory)
    stored = next((e.dtype for f in files for e in f.entries.values()), torch.float32)
    dtype = dtype or getattr(config, "dtype", None) or stored
    model = _on_meta(config, dtype, attention)
    model.tie_weights()
    config._name_or_path = str(directory)
    entries = {name: (file, name) for file in files for name in file.entries}
    found = _sources(model, entries, dtype, device)
    _read_buffers(model, entries, device)
    restream(model, found)
    return model.eval().requires_grad_(False)


@exclusive
def _on_meta(
    config: PretrainedConfig, dtype: torch.dtype | None, attention: str | None
) -> PreTrainedModel:
    with parameters_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    return model


def _weight_files(directory: Path) -> list[TensorFile]:
    try:
        if (directory / INDEX).exists():
            index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        else:
            names = sorted(path.name for path in directory.glob("*.safetensors"))
        if not names:
            raise ModelError(
                f"{directory} holds no safetensors files, which streaming needs: "
                f"{_way_out(directory)}"
            )
        return [TensorFile.open(directory / name) for name in names]
    except (OSError, ValueError, KeyError, CheckpointError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{directory} cannot be streamed: {error}") from error


def _way_out(directory: Path) -> str:
    if any(directory.glob(PICKLED)):
        written = shlex.join(["fxquant", "safetensors", str(directory)])
        return f"{written} writes them from its {PICKLED}, one shard at a time"
    return "save the model with save_pretrained(directory, safe_serialization=True)"


Entries = dict[str, tuple[TensorFile, str]]


def _find(model: PreTrainedModel, entries: Entries, name: str) -> tuple[TensorFile, str] | None:
    """The entry of a parameter; a model saved without its head lacks the prefix, or has it."""
    prefix = f"{model.base_model_prefix}."
    candidates = (name, name.removeprefix(prefix), f"{prefix}{name}")
    return next((entries[each] for each in candidates if each in entries), None)


def _sources(
    model: PreTrainedModel, entries: Entries, dtype: torch.dtype, device: torch.device
) -> dict[str, dict[str, Source]]:
    """By module path and name; tied parameters have the entry of whichever of them is stored."""
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    found: dict[str, dict[str, Source]] = {}
    missing: list[str] = []
    for names in tied.values():
        entry = next((e for name in names if (e := _find(model, entries, name))), None)
        if entry is None:
            missing.append(names[0])
            continue
        source = Source(entry[0], entry[1], dtype, device)
        shape = tuple(model.get_parameter(names[0]).shape)
        if source.shape != shape:
            raise ModelError(
                f"{names[0]} has shape {list(source.shape)} in {source.file.path}, the config "
                f"says {list(shape)}"
            )
        for name in names:
            path, _, own = name.rpartition(".")
            found.setdefault(path, {})[own] = source
    if missing:
        raise ModelError(f"the files lack the weights {', '.join(sorted(missing)[:4])}")
    return found


def _read_buffers(model: PreTrainedModel, entries: Entries, device: torch.device) -> None:
    """Buffers are small: those that are stored are read, all are moved to the device."""
    for module_path, module in model.named_modules():
        for name, value in module._buffers.items():
            entry = _find(model, entries, f"{module_path}.{name}")
            if value is not None:
                stored = value if entry is None else entry[0].read(entry[1]).to(value.dtype)
                module._buffers[name] = stored.to(device)


def is_streamed(gm: GraphModule) -> bool:
    """Whether some leaf of the graph is read from a file."""
    return any(isinstance(module, Streamed) for module in gm.modules())


def run_batches(
    gm: GraphModule,
    inputs: Sequence[dict[str, Tensor]],
    watchers: Sequence[OnNode | None] | None = None,
    until: Node | None = None,
    label: str = "",
) -> Iterator[Any]:
    """The graph's output (None if ``until`` stops before it) for each of ``inputs``, in order.

    All of them go through one block before the next begins; a streamed leaf is read once and let
    go with its block. ``watchers``: an ``on_node`` for each of the inputs. Memory: what is alive
    between two blocks, for every input. The caller chooses the grad mode. With a ``label``: a
    progress bar over the blocks, on a terminal.
    """
    executor = Executor(gm)
    watchers = [None] * len(inputs) if watchers is None else watchers
    cuts = [executor.start(**each) for each in inputs]
    last = len(executor.nodes) if until is None else executor.position[until]
    quiet = None if label else True
    found = block_starts(gm)
    starts = [*found.first.values(), *([found.behind] if found.behind else [])]
    for node in tqdm(starts, label, unit="block", leave=False, disable=quiet):
        if executor.position[node] < last:
            with executor.holding(cuts[0].position if cuts else 0, node):
                for index, watcher in enumerate(watchers):
                    cuts[index] = executor.advance(cuts[index], node, watcher)
    with executor.holding(cuts[0].position if cuts else 0, until):
        for cut, watcher in zip(cuts, watchers, strict=True):
            end = executor.advance(cut, until, watcher)
            yield end.values.get(executor.nodes[-1])
