"""Models larger than memory: opened on meta, their weights left in the safetensors files.

``stream`` gives a model that trace, convert and evaluation take like any other. Each leaf is read
when it is used; ``run_batches`` takes all batches through one block after the other, so that a
block is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from fxquant.errors import ModelError
from fxquant.files.doors import Location, as_path
from fxquant.files.tensor_file import TensorFile
from fxquant.frontends.config_kinds import check_attention, shown
from fxquant.frontends.pretrained import empty_model, read_config
from fxquant.frontends.weight_files import Stored, safetensors_weights
from fxquant.frontends.weight_names import Stacks, match
from fxquant.ir.sources import AnySource, Joined, Source
from fxquant.ir.streamed import Sources, restream
from fxquant.pipeline.arguments import as_device, checked_call


@checked_call("attention")
def stream(
    directory: Location,
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
    leaf when it is needed. Experts that transformers fuses when it loads a model are read one by
    one in a graph, all of a layer at once when the model itself is called. It cannot be moved, cast
    or trained. While it is built in half precision, torch's default dtype is that one in all
    threads, as in transformers' own loading.

    Raises ModelError, naming file and tensor, for all that transformers would warn of: no
    safetensors files there, an index that does not fit them, weights that are missing, left over,
    of another shape or kind, tied ones that differ.
    """
    directory, device = as_path(directory, "directory", ModelError), as_device(device, ModelError)
    if device.type == "meta":
        raise ModelError("device 'meta' computes nothing: take cpu or cuda")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ModelError(f"dtype must be a torch.dtype of floats or None, got {shown(dtype)}")
    if attention is not None:
        check_attention("attention", attention)
    if not directory.is_dir():
        raise ModelError(f"{directory} is no directory: streaming reads the files of one")
    stored = safetensors_weights(directory)
    config = read_config(directory)
    dtype = dtype or getattr(config, "dtype", None) or _float_dtype(stored)
    model = empty_model(config, str(directory), dtype, attention)
    config._name_or_path = str(directory)
    found, stacks = match(model, stored, directory)
    _read_buffers(model, found, device)
    restream(model, _sources(model, found, stacks, dtype, device))
    return model.eval().requires_grad_(False)


def _float_dtype(stored: Mapping[str, Stored]) -> torch.dtype:
    """Of the first floating-point tensor."""
    return next((e.dtype for e in stored.values() if e.dtype.is_floating_point), torch.float32)


def _sources(
    model: PreTrainedModel,
    stored: Mapping[str, Stored],
    stacks: Stacks,
    dtype: torch.dtype,
    device: torch.device,
) -> Sources:
    """Raises ModelError for a weight that is neither stored nor a stack of stored ones."""

    def source(entry: Stored) -> AnySource:
        assert isinstance(entry.source, TensorFile)
        return Source(entry.source, entry.name, dtype, device)

    def joined(row: tuple[Stored, ...]) -> AnySource:
        return source(row[0]) if len(row) == 1 else Joined(tuple(map(source, row)), stacked=False)

    found: Sources = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        path, _, own = name.rpartition(".")
        if name in stored:
            found.setdefault(path, {})[own] = source(stored[name])
        elif name in stacks:
            found.setdefault(path, {})[own] = Joined(tuple(map(joined, stacks[name])), stacked=True)
        else:
            raise ModelError(
                f"{model.config._name_or_path}: transformers computes {name} from several stored "
                "tensors, and not by stacking them: load it without streaming"
            )
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
