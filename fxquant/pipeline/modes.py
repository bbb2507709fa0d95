"""Modes of torch that a caller has set around a call, and which would change what is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._guards import detect_fake_mode
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fxquant.errors import ArgumentError

_AUTOCAST = ("cpu", "cuda")

P = ParamSpec("P")
T = TypeVar("T")


def without_modes(step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``step(...)`` without autocast, inference mode and a default device, whatever is around it.

    Autocast would compute in another dtype than a result says, inference mode would leave tensors
    that no one can work with outside of it, a default device would have tensors made elsewhere than
    the model is. All are as they were behind it. Raises ArgumentError under FakeTensorMode.
    """
    if detect_fake_mode() is not None:
        name = step.__name__.lstrip("_")
        raise ArgumentError(
            f"{name} is called under FakeTensorMode, where tensors have no values: leave it first"
        )
    with contextlib.ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        # Not get_default_device, which names a set_default_device over a device inside of it.
        stack = _get_current_function_mode_stack()
        if any(isinstance(mode, DeviceContext) and mode.device.type != "cpu" for mode in stack):
            modes.enter_context(torch.device("cpu"))
        return step(*args, **kwargs)
