"""The model as it was handed over: what a graph could not carry is refused by name.

A hook, or a ``forward`` that stands on an instance, changes what a module computes without being
part of it: a pass that replaces the module would lose it without a word.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registries
from transformers import PreTrainedModel

from fxquant.errors import ModelError
from fxquant.files.tensor_file import dtype_name
from fxquant.frontends.settled import WEIGHT_HOOKS
from fxquant.ir.graph import clone_sharing_storage
from fxquant.ir.streamed import sources_of

_LISTED = 3


def check_handed_over(model: PreTrainedModel) -> None:
    """Raise ModelError, naming the module, where the model computes what no graph of it would.

    Weights that are elsewhere (accelerate's offloading, meta), several devices, weights that are
    codes already, a ``forward`` put on an instance, forward hooks and forward pre-hooks, of modules
    or global. Hooks of torch.nn.utils that only compute a weight are taken (``settled``).
    """
    _check_weights(model)
    for path, module in model.named_modules():
        if "forward" in module.__dict__:
            raise ModelError(
                f"{path or type(model).__name__}: its forward was replaced on the instance by "
                f"{_named(module.__dict__['forward'])}, and a graph calls the class's: delete the "
                "attribute, or put the change into a class"
            )
    found = list(_hooks(model))
    if found:
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise ModelError(
            f"{'; '.join(found[:_LISTED])}{more}: a hook may change what the model computes, and a "
            "graph has none: remove it (handle.remove()), or put the change into a module"
        )


def own_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A clone over the model's storage, in eval mode, with the hooks that it has.

    Raises ModelError where the model holds what cannot be copied.
    """
    try:
        return clone_sharing_storage(model, hooks=True).eval()
    except Exception as error:
        raise ModelError(
            f"{_uncopied(model)} cannot be copied ({type(error).__name__}: {error}), and fxquant "
            "works on a copy: take away what it holds beside its weights"
        ) from error


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


def _hooks(model: PreTrainedModel) -> Iterator[str]:
    """Every forward hook and forward pre-hook that may change a value, in words."""
    for what, found in (
        ("hook", registries._global_forward_hooks),
        ("pre-hook", registries._global_forward_pre_hooks),
    ):
        for hook in found.values():
            yield f"a global forward {what} ({_named(hook)}) acts on every module"
    harmless = _of_transformers(model)
    for path, module in model.named_modules():
        for what, hooks in (
            ("hook", module._forward_hooks),
            ("pre-hook", module._forward_pre_hooks),
        ):
            for number, hook in hooks.items():
                if number not in harmless and not isinstance(hook, WEIGHT_HOOKS):
                    yield f"{path or type(model).__name__} has a forward {what} ({_named(hook)})"


def _of_transformers(model: PreTrainedModel) -> set[int]:
    """Ids of the hooks of ``enable_input_require_grads``, which touch gradients only."""
    one = getattr(model, "_require_grads_hook", None)
    several = getattr(model, "_require_grads_hooks", None) or []
    return {handle.id for handle in (one, *several) if hasattr(handle, "id")}


def _named(function: Any) -> str:
    """What a function is called, and the file and line where it stands."""
    function = inspect.unwrap(function) if callable(function) else function
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return name if code is None else f"{name} of {code.co_filename}:{code.co_firstlineno}"
