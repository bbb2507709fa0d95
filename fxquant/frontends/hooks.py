"""Forward hooks of the user's model: those that only watch are let go, with a note.

A graph has no hooks. The copy that says what the model computes has them, each in a wrapper that
looks at what the module was given and gives before and after the hook saw it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registries
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from fxquant.errors import ModelError
from fxquant.frontends.settled import WEIGHT_HOOKS
from fxquant.ir.graph import Note

WAY_OUT = (
    "a graph has no hooks: remove it (handle.remove()), or put the change into a module of its own"
)

# Where transformers 5 has the hooks by which a forward collects states; they stay behind.
_COLLECTING = "transformers.utils.output_capturing"


@dataclass(frozen=True)
class HookAt:
    """A forward hook or pre-hook that may change what its module computes."""

    path: str
    pre: bool
    number: int
    name: str

    def __str__(self) -> str:
        return f"{self.path} has a forward {'pre-hook' if self.pre else 'hook'} ({self.name})"

    @property
    def note(self) -> Note:
        kind = "pre-hook" if self.pre else "hook"
        name = self.name.partition(" of ")[0]
        text = f"its forward {kind} ({name}) only watched the probes: a graph does not call it"
        return Note("trace", self.path, text)


def hooks_of(model: PreTrainedModel) -> tuple[HookAt, ...]:
    """Every hook of the model that may change a value; those that only compute a weight or touch
    gradients cannot. Raises ModelError for global hooks, which act on a graph's modules too."""
    for what, known in (
        ("hook", registries._global_forward_hooks),
        ("pre-hook", registries._global_forward_pre_hooks),
    ):
        for hook in known.values():
            raise ModelError(
                f"a global forward {what} ({named(hook)}) acts on every module, those of graphs "
                "too: remove it (handle.remove())"
            )
    return tuple(_hooks(model))


def _hooks(model: PreTrainedModel) -> Iterator[HookAt]:
    harmless = _of_transformers(model)
    for path, module in model.named_modules():
        for hooks, pre in ((module._forward_hooks, False), (module._forward_pre_hooks, True)):
            for number, hook in hooks.items():
                collects = getattr(hook, "__module__", "") == _COLLECTING
                if not (number in harmless or collects or isinstance(hook, WEIGHT_HOOKS)):
                    yield HookAt(path or type(model).__name__, pre, number, named(hook))


def _of_transformers(model: PreTrainedModel) -> set[int]:
    """Ids of the hooks of ``enable_input_require_grads``, which touch gradients only."""
    one = getattr(model, "_require_grads_hook", None)
    several = getattr(model, "_require_grads_hooks", None) or []
    return {handle.id for handle in (one, *several) if hasattr(handle, "id")}


def only_watching(copy: PreTrainedModel, hooks: tuple[HookAt, ...]) -> PreTrainedModel:
    """``copy``, a clone with the user's hooks, made to raise ModelError, naming the hook, where one
    gives or writes anything else than its module does."""
    root = type(copy).__name__
    for each in hooks:
        module = copy.get_submodule("" if each.path == root else each.path)
        known = module._forward_pre_hooks if each.pre else module._forward_hooks
        known[each.number] = _Watched(known[each.number], each)
    return copy


class _Watched:
    def __init__(self, hook: Any, place: HookAt) -> None:
        self.hook = hook
        self.place = place

    def __call__(self, module: nn.Module, *given: Any) -> None:
        """``given``: args, of a hook the output last, keywords in between where it wants them."""
        before = _Values.of(given)
        back = self.hook(module, *given)
        if not before.hold(given):
            self._refuse("it writes into what its module is given or gives")
        if not (back is None or self._same(back, given)):
            self._refuse("it gives its module another value")

    def _same(self, back: Any, given: tuple[Any, ...]) -> bool:
        """Whether a hook that gives something gives what it was given."""
        if not self.place.pre:
            return _alike(back, given[-1])
        if len(given) == 2:  # with keywords
            return _alike(back, given)
        return _alike(back if isinstance(back, tuple) else (back,), given[0])

    def _refuse(self, why: str) -> None:
        raise ModelError(f"{self.place}: {why}, and {WAY_OUT}")


@dataclass(frozen=True)
class _Values:
    """What stands in a nest of values, and what its tensors held."""

    leaves: list[Any]
    held: list[Tensor | None]

    @classmethod
    def of(cls, nest: Any) -> _Values:
        leaves = pytree.tree_leaves(nest)
        held = [each.detach().clone() if isinstance(each, Tensor) else None for each in leaves]
        return cls(leaves, held)

    def hold(self, nest: Any) -> bool:
        """Whether it is the same nest, to the bit."""
        leaves = pytree.tree_leaves(nest)
        return _identical(leaves, self.leaves) and all(
            torch.equal(_bits(before), _bits(now))
            for before, now in zip(self.held, leaves, strict=True)
            if before is not None
        )


def _alike(one: Any, other: Any) -> bool:
    return _identical(pytree.tree_leaves(one), pytree.tree_leaves(other))


def _identical(some: list[Any], others: list[Any]) -> bool:
    same = (a is b for a, b in zip(some, others, strict=False))
    return len(some) == len(others) and all(same)


def _bits(value: Tensor) -> Tensor:
    """Bytes, in which a NaN equals itself."""
    return value.detach().contiguous().flatten().view(torch.uint8)


def named(function: Any) -> str:
    """What a function is called, and the file and line where it stands."""
    function = inspect.unwrap(function) if callable(function) else function
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return name if code is None else f"{name} of {code.co_filename}:{code.co_firstlineno}"
