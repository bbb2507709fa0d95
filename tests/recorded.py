"""The recorder's graph of a model whose like was recorded before in this process.

Recording took more than half of the tests' time under transformers 5: one after the other converts
the same few tiny models. A recording depends on a model's structure and never on its weights, so
that where all of the structure is the same, the graph is. All else of a trace is done anew, its
comparison with the model above all; and the files of RECORDED_ANEW share no recording.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Hashable, Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    PretrainedConfig,
)

from fxquant.frontends import tracing
from fxquant.frontends.attention import NAME
from fxquant.frontends.recorder.record import Recorded, Run, record

_PLAIN: Final = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device)
_REGISTRIES: Final = (AttentionInterface, AttentionMaskInterface)
_PATHS: Final = ("name_or_path", "_name_or_path")  # where a model is from, which none computes with


# Files of which recording itself is a subject.
RECORDED_ANEW: Final = (
    "test_custom_code.py",
    "test_forks.py",
    "test_model_mutations.py",
    "test_more_architectures.py",
    "test_recorded.py",
    "test_recorder.py",
    "test_streaming.py",
    "test_threads.py",
    "test_tracing.py",
)


class Unknown(Exception):
    """A part of a model of which nobody here knows whether it is the same in another."""


class RecordedOnce:
    """``record``, but a copy of what it gave before for a model of the same structure."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Recorded] = {}

    def __call__(self, model: nn.Module, run: Run) -> Recorded:
        try:
            key = (structure(model), run)
        except Unknown:
            return record(model, run)
        if key not in self._known:
            made = record(model, run)
            if made.constants:  # the model's own numbers
                return made
            self._known[key] = made
        known = self._known[key]
        return Recorded(copy.deepcopy(known.graph), {}, known.longest)


def structure(model: nn.Module) -> Hashable:
    """All that code of ``model`` may read but for the numbers in its tensors, and the attention
    that is registered for it. Of a class, its forward may have been replaced, and nothing else.

    Raises Unknown where it holds something whose like is not known, as an object with a state.
    """
    seen: dict[int, int] = {}  # tied tensors, and modules that stand in two places
    registered = tuple(_value(each._global_mapping.get(NAME)) for each in _REGISTRIES)
    return registered, tuple(
        (path, seen.setdefault(id(module), len(seen)), *_parts(module, seen))
        for path, module in model.named_modules(remove_duplicate=False)
    )


def _parts(module: nn.Module, seen: dict[int, int]) -> tuple[Any, ...]:
    found: list[Any] = [type(module), type(module).forward]
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers"):
            found.append((name, *((key, _tensor(each, seen)) for key, each in value.items())))
        elif name != "_modules" and name not in _PATHS:
            found.append((name, _value(value)))
    return tuple(found)


def _tensor(tensor: Tensor | None, seen: dict[int, int]) -> Hashable:
    if tensor is None:
        return None
    place = seen.setdefault(id(tensor), len(seen))
    kind = (type(tensor), tensor.dtype, tensor.device, tensor.requires_grad)
    return place, kind, tuple(tensor.shape), tensor.stride()


def _value(value: Any) -> Hashable:
    if type(value) in _PLAIN or isinstance(value, type | BuiltinFunctionType):
        return type(value), value
    if isinstance(value, PretrainedConfig | GenerationConfig):
        told = {name: each for name, each in value.to_dict().items() if name not in _PATHS}
        return type(value), getattr(value, "_attn_implementation", None), _value(told)
    if isinstance(value, dict | list | tuple | set | frozenset):
        items = value.items() if isinstance(value, dict) else value
        return type(value), tuple(_value(each) for each in items)
    if isinstance(value, partial):
        return partial, _value((value.func, value.args, value.keywords))
    if isinstance(value, FunctionType):
        cells = tuple(_value(cell.cell_contents) for cell in value.__closure__ or ())
        given = _value((value.__module__, value.__defaults__, value.__kwdefaults__))
        return value.__code__, given, cells
    raise Unknown(type(value))


@contextlib.contextmanager
def shared(recorded: RecordedOnce) -> Iterator[None]:
    """``trace`` takes its recordings from ``recorded`` meanwhile."""
    with mock.patch.object(tracing, "record", recorded):
        yield


_THIS_PROCESS: Final = RecordedOnce()


@contextlib.contextmanager
def sharing(file: str) -> Iterator[None]:
    """While tests of ``file`` run: they share what was recorded, but for files of RECORDED_ANEW."""
    with contextlib.nullcontext() if file in RECORDED_ANEW else shared(_THIS_PROCESS):
        yield
