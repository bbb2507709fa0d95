"""The modules of a shadow, made to say where they are: leaves become nodes, others places."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fxquant.frontends.leaves import is_leaf
from fxquant.frontends.recorder.guards import Guards
from fxquant.frontends.recorder.recording import Recording
from fxquant.frontends.recorder.spelling import Call


class FailedIn(Exception):
    """Why recording stopped (its cause), and the path of the innermost module that was running."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class Stopped(Exception):
    """Nobody waits for the recording any more."""


def watch(shadow: nn.Module, original: nn.Module, recording: Recording, guards: Guards) -> None:
    """Let every forward of ``shadow``, whose modules stand for those of ``original``, be recorded.

    Only attributes of the shadow's own modules change: no other thread or model sees any of it.
    """
    for path, module in shadow.named_modules():
        leaf = bool(path) and is_leaf(original.get_submodule(path))
        wrap = _leaf if leaf else _place
        module.forward = wrap(path, module.forward, recording, guards)


def _place(
    path: str, forward: Callable[..., Any], recording: Recording, guards: Guards
) -> Callable[..., Any]:
    def inside(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if recording.stop.is_set():
            raise Stopped
        value = forward(*args, **kwargs)
        guards.check()
        return value

    return _placed(path, forward, recording, inside)


def _leaf(
    path: str, forward: Callable[..., Any], recording: Recording, guards: Guards
) -> Callable[..., Any]:
    def inside(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        versions = [tensor._version for tensor in given]
        recording.paused = True
        try:
            guards.check()
            value = forward(*args, **kwargs)
            guards.check_inside()
        finally:
            recording.paused = False
        written = [tensor._version for tensor in given] != versions
        # What gives its input back does nothing: dropout of an eval model.
        if written or not any(value is tensor for tensor in given):
            recording.call(Call("call_module", path, args, kwargs), value)
        return value

    return _placed(path, forward, recording, inside)


def _placed(
    path: str,
    forward: Callable[..., Any],
    recording: Recording,
    inside: Callable[[tuple[Any, ...], dict[str, Any]], Any],
) -> Callable[..., Any]:
    """``forward`` while nothing is recorded, else ``inside``, whose nodes stand at ``path``."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if recording.paused:
            return forward(*args, **kwargs)
        recording.places.append(path)
        try:
            return inside(args, kwargs)
        except (Stopped, FailedIn):
            raise
        except Exception as error:
            raise FailedIn(path) from error
        finally:
            recording.places.pop()

    return run
