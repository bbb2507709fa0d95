"""Recording a model: run its shadow once, and let the nodes be what it did."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph

from fxquant.errors import TracingError
from fxquant.frontends.recorder.apart import apart
from fxquant.frontends.recorder.guards import Guards
from fxquant.frontends.recorder.mode import Recorder
from fxquant.frontends.recorder.modules import FailedIn, watch
from fxquant.frontends.recorder.recording import NoDtypeYet, Recording
from fxquant.frontends.recorder.shadow import markers, shadow_of

Run = Callable[[nn.Module, Tensor, Tensor], Any]


@dataclass(frozen=True)
class Recorded:
    """A graph whose targets are paths in the model. ``constants``: tensors that it reads beside the
    model's own, by the name that they have in it. ``longest``: the greatest length for which it
    holds, None where nothing bounds it."""

    graph: Graph
    constants: dict[str, Tensor]
    longest: int | None = None


def record(model: nn.Module, run: Run) -> Recorded:
    """The graph of what ``run(model, input_ids, attention_mask)`` computes.

    Args:
        model: left as it is; its weights may be on meta.
        run: gives the logits.

    Raises TracingError naming the module whose code has no graph: it decides by values or by sizes,
    or hides what it computes.
    """
    *early, last = markers(model)
    for marker in early:
        try:
            return apart(partial(_recorded, model, run, marker))
        except TracingError as error:
            if not _may_be_the_dtype(error.__cause__):
                raise
    return apart(partial(_recorded, model, run, last))


def _may_be_the_dtype(cause: BaseException | None) -> bool:
    """Whether a model might do in its own dtype what it failed to do in the marker's."""
    if isinstance(cause, TracingError):
        return isinstance(cause, NoDtypeYet)
    return not _decides_by_values(cause)


@torch.no_grad()
def _recorded(
    model: nn.Module, run: Run, marker: torch.dtype | None, stop: threading.Event
) -> Recorded:
    shadow = shadow_of(model, marker)
    recording = Recording(shadow, model, stop)
    guards = Guards(shadow.env, shadow.input_ids)
    watch(shadow.model, model, recording, guards)
    try:
        with enable_python_dispatcher(), shadow.mode, Recorder(recording, guards):
            logits = run(shadow.model, shadow.input_ids, shadow.attention_mask)
        recording.output(logits)
    except FailedIn as failure:
        error = failure.__cause__
        assert error is not None
        raise _untraceable(model, failure.path, error) from error
    except TracingError as error:
        raise _untraceable(model, "", error) from error
    constants = {name: tensor.detach() for name, tensor in recording.values.constants.items()}
    return Recorded(recording.graph, constants, guards.longest)


# What torch raises where Python asks a tensor without data for its values.
_VALUES = ("DataDependentOutputException", "GuardOnDataDependentSymNode")


def _untraceable(model: nn.Module, path: str, error: BaseException) -> TracingError:
    where = f"module {path}" if path else "the model itself"
    if _decides_by_values(error):
        what = "it decides by values, not only by sizes, and a graph holds one way only"
    elif isinstance(error, TracingError):
        what = str(error)
    else:
        text = str(error).strip()
        what = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
    return TracingError(f"{type(model).__name__} cannot be traced: {where}: {what}")


def _decides_by_values(error: BaseException | None) -> bool:
    return any(type(each).__name__ in _VALUES for each in _chain(error))


def _chain(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
