"""The function mode that writes down each torch function that a model calls."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxquant.errors import TracingError
from fxquant.frontends.recorder.guards import Guards
from fxquant.frontends.recorder.recording import Recording
from fxquant.frontends.recorder.spelling import (
    Call,
    is_method,
    method,
    name_of,
    out_of_place,
    spelled,
)

_FILLS = ("copy_", "fill_", "zero_")
# Made of numbers: without a dtype they take the process's default when the graph runs.
_MADE = (torch.ones, torch.zeros, torch.full, torch.empty, torch.tensor, torch.arange)


class Recorder(TorchFunctionMode):
    """Calls that give no tensor (sizes, dtypes) are answered and not written down."""

    def __init__(self, recording: Recording, guards: Guards) -> None:
        super().__init__()
        self._recording, self._guards = recording, guards

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self._recording.paused:
            return func(*args, **kwargs)
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        versions = [tensor._version for tensor in given]
        self._guards.check()
        value = func(*args, **kwargs)
        written = [t for t, v in zip(given, versions, strict=True) if t._version != v]
        gives_tensors = any(isinstance(each, Tensor) for each in tree_leaves(value))
        if written or gives_tensors:
            self._guards.check_inside()
        if written:
            self._write(func, args, kwargs, value, written)
        elif gives_tensors and not _stays_on_its_device(func, args, kwargs, value):
            self._recording.call(spelled(func, args, _with_dtype(func, kwargs, value)), value)
        return value

    def _write(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, value: Any, written: list[Tensor]
    ) -> None:
        """A call that wrote into a tensor, as one that makes a new tensor where that is the same.

        Where others lie in the same memory, what is new is written over the old as a whole: passes
        keep setitem, and drop other calls without users.
        """
        record, name = self._recording, name_of(func)
        for tensor in written:
            if (path := record.values.owned(tensor)) is not None:
                raise TracingError(f"it writes into its own {path}")
        if name == "__setitem__":
            record.call(spelled(func, args, kwargs), None)
            return
        target = args[0] if args else None
        if not isinstance(target, Tensor) or len(written) > 1 or written[0] is not target:
            raise TracingError(f"{name} writes into a tensor that is not its first operand")
        if name in _FILLS:
            self._overwrite(target, record.operand(args[1] if len(args) > 1 else 0))
            return
        call = _plain(func, args, kwargs)
        others = [a for a in tree_leaves((args[1:], kwargs)) if isinstance(a, Tensor)]
        keeps = all(torch.promote_types(o.dtype, target.dtype) == target.dtype for o in others)
        if keeps and record.values.is_alone(target):
            record.call(call, target)
        else:
            old = record.values.node_of(target)
            new = record.call(call, target)
            record.values.bind(target, old)
            self._overwrite(target, new)

    def _overwrite(self, target: Tensor, new: Any) -> None:
        old = self._recording.values.node_of(target)
        self._recording.add("call_function", operator.setitem, (old, Ellipsis, new))


def _plain(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call that gives what ``func`` writes."""
    name = name_of(func)
    if kwargs.get("inplace"):
        return spelled(func, args, {**kwargs, "inplace": False})
    plain = out_of_place(name) if is_method(func) else None
    if plain is None:
        raise TracingError(f"it calls {name}, which has no form that leaves its tensor alone")
    return method(plain, args, kwargs)


def _stays_on_its_device(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
) -> bool:
    """A move to where the tensor is. A cast is kept: the graph may get another dtype."""
    if not (args and value is args[0] and func in (Tensor.to, Tensor.cpu, Tensor.cuda)):
        return False
    asked = tree_leaves((args[1:], kwargs))
    return not any(isinstance(each, torch.dtype | Tensor) for each in asked)


def _with_dtype(func: Any, kwargs: dict[str, Any], value: Any) -> dict[str, Any]:
    made = func in _MADE and isinstance(value, Tensor) and value.is_floating_point()
    return {**kwargs, "dtype": value.dtype} if made and kwargs.get("dtype") is None else kwargs
