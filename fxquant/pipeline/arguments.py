"""How a public function is called: one error for what it does not take, with what it does; and the
door of every device that is given to one."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import torch

from fxquant.errors import ArgumentError, FxquantError
from fxquant.files.doors import printable, reason

P = ParamSpec("P")
R = TypeVar("R")


def checked_call(**meant: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a public function: a call that does not fit its signature raises ArgumentError.

    ``meant``: names that are not its own, and what they are called here (``windows="count"``).
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                unknown = [name for name in kwargs if name not in signature.parameters]
                name = function.__name__
                raise ArgumentError(_message(name, signature, unknown, meant, error)) from None
            return function(*args, **kwargs)

        return called

    return decorate


def _message(
    name: str,
    signature: inspect.Signature,
    unknown: list[str],
    meant: Mapping[str, str],
    error: TypeError,
) -> str:
    known = list(signature.parameters)
    said = [_unknown(each, known, meant) for each in unknown] or [str(error)]
    parameters = signature.parameters.values()
    listed = [each.name if each.default is each.empty else f"{each.name}=" for each in parameters]
    by_name = [each.kind is each.KEYWORD_ONLY for each in parameters]
    if any(by_name):
        listed.insert(by_name.index(True), "*")
    behind = " (by name what stands behind the *)" if "*" in listed else ""
    return f"{name}: {'; '.join(said)}. It takes {name}({', '.join(listed)}){behind}"


def _unknown(name: str, known: list[str], meant: Mapping[str, str]) -> str:
    near = [meant[name]] if name in meant else difflib.get_close_matches(name, known, 1)
    hint = f" (did you mean {near[0]}=?)" if near else ""
    return f"no argument {name}={hint}"


def as_device(given: str | torch.device, error: type[FxquantError]) -> torch.device:
    """The device that ``given`` names, where tensors can be made; ``error``, naming it, if not.

    "meta" is one: who computes there has to refuse it.
    """
    if not isinstance(given, str | torch.device):
        raise error(
            f"device must be text or a torch.device, not a {type(given).__name__}; give "
            "device='cpu'"
        )
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    # The last is of torch's, for a device whose package is not there.
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as refused:
        shown = printable(str(given)[:40])
        raise error(
            f"device {shown!r} cannot be used here ({reason(refused)}); give device='cpu'"
        ) from refused
    return device
