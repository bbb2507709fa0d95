"""How a public function is called: one error for what it does not take, with what it does; and the
door of every device that is given to one."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ParamSpec, TypeVar

import torch

from fxquant.errors import ArgumentError, FxquantError
from fxquant.files.doors import printable, reason
from fxquant.pipeline.modes import without_modes
from fxquant.pipeline.options import allowed, fits
from fxquant.schemes.spelling import shown

P = ParamSpec("P")
R = TypeVar("R")


def checked_call(*own: str, **meant: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a public function: a call that does not fit its signature raises ArgumentError, as
    does an option whose value is not of the annotated kind, where any value of that kind may stand.
    It runs without the modes of torch that are set around it: see ``without_modes``.

    ``own``: options that the function checks itself. ``meant``: names that are not its own, and
    what they are called here (``windows="count"``).
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        hints = functools.cache(lambda: _plain_hints(function, signature, own))

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                unknown = [name for name in kwargs if name not in signature.parameters]
                name = function.__name__
                raise ArgumentError(_message(name, signature, unknown, meant, error)) from None
            for name, hint in hints().items():
                if name in given and not _taken(hint, given[name]):
                    raise ArgumentError(
                        f"{function.__name__}: {name} must be {allowed(hint)}, got "
                        f"{printable(shown(given[name]))}"
                    )
            return without_modes(function, *args, **kwargs)

        return called

    return decorate


def _plain_hints(
    function: Callable[..., object], signature: inspect.Signature, own: tuple[str, ...]
) -> dict[str, object]:
    """Annotations that say all: of options, and of plain values and our own classes. What a path,
    a dtype or a model may be is for the function to say."""
    hints = typing.get_type_hints(function, include_extras=True)
    options = (
        name
        for name, each in signature.parameters.items()
        if name not in own
        and (
            each.default is not each.empty
            or each.kind is each.KEYWORD_ONLY
            or hints.get(name) in (int, str)
        )
    )
    return {name: hints[name] for name in options if _is_plain(hints[name])}


def _is_plain(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Callable:
        return True
    if arguments := typing.get_args(hint):
        known = (typing.Union, types.UnionType, Annotated, Sequence)
        return origin in known and all(
            map(_is_plain, arguments[:1] if origin is Annotated else arguments)
        )
    room = getattr(hint, "__module__", "").partition(".")[0]
    return hint in (bool, float, int, str, type(None)) or room in ("fxquant", "transformers")


def _taken(hint: Any, value: object) -> bool:
    """As ``fits``; which floats a number may be, infinite ones too, the function says."""
    return fits(hint, value) or (
        isinstance(value, float) and not math.isfinite(value) and fits(hint, 0.0)
    )


def _message(
    name: str,
    signature: inspect.Signature,
    unknown: list[str],
    meant: Mapping[str, str],
    error: TypeError,
) -> str:
    known = [each for each in signature.parameters if each != "self"]
    said = [_unknown(each, known, meant) for each in unknown] or [str(error)]
    parameters = [signature.parameters[name] for name in known]
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
