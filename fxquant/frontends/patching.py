"""What tracing and opening on meta patch for the whole process, made to act in one thread only.

torch.fx traces by replacing ``nn.Module.__call__`` and ``__getattr__``; transformers replaces
constructors such as ``torch.arange``. Every thread sees the replacements, so each looks at the
thread that calls it: elsewhere it is what it replaces. ``LOCK`` lets one patching thread in at a
time, and whatever ends it, all is put back twice over: an interruption may hit the first time.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
import torch._export.utils as export_utils
import torch.export._trace as export_trace
import torch.fx._symbolic_trace as symbolic
from torch import nn
from torch.utils._device import _device_constructors
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationMixin,
    PreTrainedModel,
)

try:
    import transformers.utils.fx as hf_fx
    from transformers.modeling_attn_mask_utils import AttentionMaskConverter
except ImportError:  # transformers 5 has no tracer, and all its masks come from the registry
    hf_fx = None

LOCK = threading.RLock()
FORK_WAITS = 60.0  # seconds, for a trace in another thread to end
_HERE = threading.local()  # of each thread: whether a holder of LOCK waits for it, what a fork took
_OURS = weakref.WeakSet[Callable[..., Any]]()  # what ``for_this_thread`` made
_UNDER_WAY: list[Callable[[], None]] = []  # how what LOCK's holder has patched is put back

_PATCHED: tuple[tuple[Any, str], ...] = (
    (nn.Module, "__call__"),
    (nn.Module, "__getattr__"),
    (nn.Module, "register_parameter"),
    (symbolic, "_is_fx_tracing_flag"),
    (symbolic, "_new_patcher"),
    (symbolic, "CURRENT_PATCHER"),
    (PreTrainedModel, "init_weights"),
    (GenerationMixin, "load_custom_generate"),
    (torch.compiler, "_is_compiling_flag"),
    (torch.compiler, "_is_exporting_flag"),
    *((module, "_compiling_state_context") for module in (export_utils, export_trace)),
)
if hf_fx is not None:
    _PATCHED += (
        *((torch, name) for name in hf_fx.HFTracer._TORCH_METHODS_TO_PATCH),
        (hf_fx, "_CURRENT_TRACER"),
        (AttentionMaskConverter, "_ignore_causal_mask_sdpa"),
    )


_BY_LOADING = (nn.Module, "register_parameter")  # which from_pretrained patches for all threads
_REGISTRIES = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
_LOGGER = logging.getLogger("torch.fx._symbolic_trace")

P = ParamSpec("P")
T = TypeVar("T")


class _HereOnly:
    """A flag that is true in the thread that made it and false in all others."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self._thread


def for_this_thread(new: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """``new`` in the calling thread, ``original`` in all others, even after it is put back."""
    thread = threading.get_ident()

    @functools.wraps(original)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        chosen = new if threading.get_ident() == thread else original
        return chosen(*args, **kwargs)

    _OURS.add(dispatch)
    return dispatch


class _Patcher(symbolic._Patcher):
    """torch.fx's, with methods that it replaces in one thread only."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def patch_method(
        self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True
    ) -> None:
        ours = for_this_thread(new_fn, getattr(cls, name))
        super().patch_method(cls, name, ours, deduplicate)

    def revert_all_patches(self) -> list[Any]:
        """As torch.compile does for the time that it compiles; in another thread nothing is."""
        return super().revert_all_patches() if self._is_here() else self.patches_made

    def reapply_all_patches(self) -> list[Any]:
        return super().reapply_all_patches() if self._is_here() else self.patches_made

    def _is_here(self) -> bool:
        return threading.get_ident() == self._thread

    def revert(self) -> None:
        """Take back all patches, those that are taken back already too."""
        for patch in reversed(self.patches_made):
            with contextlib.suppress(KeyError):  # a builtin's name, deleted before
                patch.revert()


def _putting_back() -> Callable[[], None]:
    _device_constructors()  # torch keeps what it finds at its first question, patched or not
    before = [(owner, name, inspect.getattr_static(owner, name)) for owner, name in _PATCHED]
    registered = [(registry, set(registry)) for registry in _REGISTRIES]
    level, thread, grad = _LOGGER.level, threading.get_ident(), torch.is_grad_enabled()

    def put_back() -> None:
        if threading.get_ident() == thread:  # not in a child that another thread forked
            torch.set_grad_enabled(grad)
        for owner, name, value in before:
            # What transformers' loading in another thread has patched is put back there.
            if (owner, name) != _BY_LOADING or inspect.getattr_static(owner, name) in _OURS:
                setattr(owner, name, value)
        for registry, names in registered:
            for name in registry.keys() - names:
                del registry[name]
        _LOGGER.setLevel(level)

    return put_back


def exclusive(step: Callable[P, T]) -> Callable[P, T]:
    """``step`` holding LOCK, after which everything that is patched anywhere is as it was.

    Plain try and finally: an interruption inside contextlib would leave its generator suspended,
    and one on the way out of a with statement LOCK taken, for which other threads wait for ever.
    """

    def restoring(*args: P.args, **kwargs: P.kwargs) -> T:
        put_back, depth = _putting_back(), len(_UNDER_WAY)
        try:
            try:
                _UNDER_WAY.append(put_back)
                return step(*args, **kwargs)
            finally:
                put_back()
        finally:
            put_back()  # the first may have been interrupted
            del _UNDER_WAY[depth:]

    @functools.wraps(step)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        taken = False
        try:
            try:
                taken = not _is_lent() and LOCK.acquire()
                return restoring(*args, **kwargs)
            finally:
                # One line, which is interrupted before it or behind it.
                taken = bool(taken and LOCK.release())  # type: ignore[func-returns-value]
        finally:
            if taken:
                LOCK.release()

    return alone


@contextlib.contextmanager
def lent() -> Iterator[None]:
    """In a thread that a holder of LOCK waits for: the turn is this thread's meanwhile."""
    _HERE.lent = True
    try:
        yield
    finally:
        _HERE.lent = False


def _is_lent() -> bool:
    return getattr(_HERE, "lent", False)


def _before_fork() -> None:
    """A child forked in the middle of a trace would have its patches: wait for the end of it, but
    not for ever, and not where it waits for this thread."""
    _HERE.took = not _is_lent() and LOCK.acquire(timeout=FORK_WAITS)


def _in_parent() -> None:
    if _HERE.took:
        LOCK.release()


def _in_child() -> None:
    """Where the trace was not over: the thread that traced is not here to put anything back."""
    if _HERE.took:
        LOCK.release()
        return
    for put_back in reversed(_UNDER_WAY):
        put_back()
    _UNDER_WAY.clear()
    LOCK._at_fork_reinit()  # type: ignore[attr-defined]


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """In an ``exclusive`` function: torch.fx's tracing of this thread leaves others alone."""
    made: list[_Patcher] = []

    @contextlib.contextmanager
    def new_patcher() -> Iterator[_Patcher]:
        patcher = _Patcher()
        made.append(patcher)
        symbolic.CURRENT_PATCHER = patcher
        symbolic._is_fx_tracing_flag = _HereOnly()  # type: ignore[assignment]
        try:
            yield patcher
        finally:
            patcher.revert()

    def revert() -> None:
        for patcher in made:
            patcher.revert()

    _UNDER_WAY.append(revert)
    symbolic._new_patcher = for_this_thread(new_patcher, symbolic._new_patcher)
    _LOGGER.setLevel(logging.ERROR)  # it warns of what transformers' tracer does
    try:
        yield
    finally:
        revert()


@contextlib.contextmanager
def _replaced(*changes: tuple[Any, str, object]) -> Iterator[None]:
    """Within the block, each (owner, name) is the value that stands behind it."""
    before = [(owner, name, inspect.getattr_static(owner, name)) for owner, name, _ in changes]
    for change in changes:
        setattr(*change)
    try:
        yield
    finally:
        for (owner, name, value), (_, _, ours) in zip(before, changes, strict=True):
            if (owner, name) != _BY_LOADING or inspect.getattr_static(owner, name) is ours:
                setattr(owner, name, value)


@contextlib.contextmanager
def _compiling_here() -> Iterator[None]:
    """What torch does while it exports, whose flags are true for all threads: models that run there
    meanwhile would hand their operators to this thread's trace."""
    flags = [
        (torch.compiler, f"_is_{name}_flag", _HereOnly()) for name in ("compiling", "exporting")
    ]
    with _replaced(*flags):
        yield


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """In an ``exclusive`` function: torch.export of this thread leaves others alone."""
    modules = (export_utils, export_trace)
    changes = [(module, "_compiling_state_context", _compiling_here) for module in modules]
    with tracing(), _replaced(*changes):
        yield


@contextlib.contextmanager
def no_mask_left_out() -> Iterator[None]:
    """In an ``exclusive`` function: models of this thread make their masks whatever these hold.

    transformers 4 leaves a mask out where no token is padding, which only values tell.
    """
    if hf_fx is None:
        yield
        return
    ours = for_this_thread(lambda *_, **__: False, AttentionMaskConverter._ignore_causal_mask_sdpa)
    with _replaced((AttentionMaskConverter, "_ignore_causal_mask_sdpa", staticmethod(ours))):
        yield


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """In an ``exclusive`` function: modules that this thread builds have their parameters on meta,
    unset, and real buffers; models are not tied yet."""

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and not over:
            stand_in = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            module._parameters[name] = stand_in

    def leave(model: PreTrainedModel) -> None:
        """Nothing to start with: the weights come from files."""

    over = False
    original, init = nn.Module.register_parameter, PreTrainedModel.init_weights
    try:
        with _replaced(
            (nn.Module, "register_parameter", for_this_thread(register, original)),
            (PreTrainedModel, "init_weights", for_this_thread(leave, init)),
        ):
            yield
    finally:
        over = True  # what another thread has kept of this, and puts back, does nothing


@contextlib.contextmanager
def own_generate() -> Iterator[None]:
    """In an ``exclusive`` function: models that this thread loads keep transformers' ``generate``.

    transformers 4.57 imports custom_generate/generate.py of a local folder, trusted or not.
    """

    def none(*_: Any, **__: Any) -> None:
        raise OSError("fxquant runs no code of a checkpoint")

    original = GenerationMixin.load_custom_generate
    replaced = for_this_thread(none, original)
    with _replaced((GenerationMixin, "load_custom_generate", replaced)):
        yield
