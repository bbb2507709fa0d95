"""The model as it was handed over: what a graph could not carry is refused by name.

A ``forward`` that stands on an instance changes what a module computes without being part of it: a
pass that replaces the module would lose it without a word.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn
from transformers import PreTrainedModel

from fxquant.errors import ModelError
from fxquant.files.tensor_file import dtype_name
from fxquant.frontends.hooks import HookAt, hooks_of, named
from fxquant.ir.graph import clone_sharing_storage
from fxquant.ir.streamed import sources_of


def check_handed_over(model: PreTrainedModel) -> tuple[HookAt, ...]:
    """Raise ModelError, naming the module, where the model computes what no graph of it would.

    Weights that are elsewhere (accelerate's offloading, meta), several devices, weights that are
    codes already, a ``forward`` put on an instance, global forward hooks. Returns the model's own
    hooks, but for those of torch.nn.utils that only compute a weight (``settled``): what they do is
    known when they have seen a probe (``hooks.only_watching``).
    """
    _check_weights(model)
    for path, module in model.named_modules():
        if "forward" in module.__dict__ and not has_own_forward(module):
            raise ModelError(
                f"{path or type(model).__name__}: its forward was replaced on the instance by "
                f"{named(module.__dict__['forward'])}, and a graph calls the class's: delete the "
                "attribute, or put the change into a class"
            )
    return hooks_of(model)


def has_own_forward(module: nn.Module) -> bool:
    """Whether its ``forward`` is its class's, put there too: transformers wraps the forwards of a
    model that is asked for hidden states, and puts them back."""
    forward = module.forward
    return (
        getattr(forward, "__self__", None) is module
        and getattr(forward, "__func__", None) is type(module).forward
    )


def own_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A clone over the model's storage, in eval mode, with the hooks that it has.

    Raises ModelError where the model holds what cannot be copied.
    """
    try:
        clone = clone_sharing_storage(model, hooks=True).eval()
    except Exception as error:
        raise ModelError(
            f"{_uncopied(model)} cannot be copied ({type(error).__name__}: {error}), and fxquant "
            "works on a copy: take away what it holds beside its weights"
        ) from error
    for module in clone.modules():
        module.__dict__.pop("forward", None)  # the class's own: see has_own_forward
    return clone


def _uncopied(model: nn.Module) -> str:
    """The innermost module that cannot be copied by itself."""
    for path, module in reversed(list(model.named_modules())):
        held = {k: v for k, v in module.__dict__.items() if k not in ("_modules", "_parameters")}
        for name, value in held.items():
            try:
                copy.deepcopy(value)
            except Exception:
                return f"{path or type(model).__name__}: its attribute {name}"
    return type(model).__name__


def _check_weights(model: PreTrainedModel) -> None:
    devices: dict[torch.device, str] = {}
    for path, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise ModelError(
                f"{path or type(model).__name__}: accelerate moves its weights at each call "
                f"({type(module._hf_hook).__name__}): load the model without device_map and "
                "offloading; fxquant.frontends.streaming.stream (--stream) opens one that is "
                "larger than memory"
            )
        for name, value in itertools.chain(module._parameters.items(), module._buffers.items()):
            if value is None or name in sources_of(module):
                continue
            place = f"{path}.{name}".removeprefix(".")
            if value.is_meta:
                raise ModelError(
                    f"{place} is on device meta, so it holds no values: load the model's weights"
                )
            devices.setdefault(value.device, place)
            if name == "weight" and isinstance(value, nn.Parameter):
                _check_float(place, value)
    if len(devices) > 1:
        places = ", ".join(f"{place} on {device}" for device, place in devices.items())
        raise ModelError(f"the model's tensors are on several devices ({places}): move it to one")


def _check_float(place: str, weight: nn.Parameter) -> None:
    if not weight.dtype.is_floating_point or weight.element_size() < 2:
        raise ModelError(
            f"{place} is {dtype_name(weight.dtype)}: the weights are quantized "
            "already, and fxquant starts from the float model"
        )
