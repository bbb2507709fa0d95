"""Models larger than memory: opened on meta, their weights left in the safetensors files.

``stream`` gives a model that trace, convert and evaluation take like any other. Each leaf is read
when it is used; ``run_batches`` takes all batches through one block after the other, so that a
block is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from tqdm import tqdm
from transformers import PreTrainedModel

from fxquant.blocks import block_starts
from fxquant.errors import ModelError
from fxquant.execution import Executor, OnNode
from fxquant.pretrained import empty_model, read_config
from fxquant.streamed import Source, Streamed, restream
from fxquant.tensor_file import TensorFile
from fxquant.weight_files import Stored, safetensors_weights
from fxquant.weight_names import match


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

    Raises ModelError, naming file and tensor, for all that transformers would warn of: no
    safetensors files there, an index that does not fit them, weights that are missing, left over,
    of another shape or kind, tied ones that differ.
    """
    directory, device = Path(directory), torch.device(device)
    if not directory.is_dir():
        raise ModelError(f"{directory} is no directory: streaming reads the files of one")
    stored = safetensors_weights(directory)
    config = read_config(directory)
    dtype = dtype or getattr(config, "dtype", None) or _float_dtype(stored)
    model = empty_model(config, str(directory), dtype, attention)
    config._name_or_path = str(directory)
    found = match(model, stored, directory)
    _read_buffers(model, found, device)
    restream(model, _sources(model, found, dtype, device))
    return model.eval().requires_grad_(False)


def _float_dtype(stored: Mapping[str, Stored]) -> torch.dtype:
    """Of the first floating-point tensor."""
    return next((e.dtype for e in stored.values() if e.dtype.is_floating_point), torch.float32)


def _sources(
    model: PreTrainedModel, stored: Mapping[str, Stored], dtype: torch.dtype, device: torch.device
) -> dict[str, dict[str, Source]]:
    """By module path and name."""
    found: dict[str, dict[str, Source]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        path, _, own = name.rpartition(".")
        entry = stored[name]
        assert isinstance(entry.source, TensorFile)
        found.setdefault(path, {})[own] = Source(entry.source, entry.name, dtype, device)
    return found


def _read_buffers(
    model: PreTrainedModel, stored: Mapping[str, Stored], device: torch.device
) -> None:
    """Buffers are small: those that are part of the state are read, all are moved to the device."""
    for module_path, module in model.named_modules():
        for name, value in module._buffers.items():
            entry = stored.get(f"{module_path}.{name}")
            if value is not None:
                read = value if entry is None else entry.read().to(value.dtype)
                module._buffers[name] = read.to(device)


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
