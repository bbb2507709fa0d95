"""How torch.fx spells a call that a function mode sees: ``x.add(y)`` is ``operator.add``."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_OPERATORS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(operator, name)
        for name in ("add", "sub", "mul", "matmul", "pow", "eq", "ne", "lt", "le", "gt", "ge")
    },
    **{f"__{name}__": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{"div": operator.truediv, "true_divide": operator.truediv, "__div__": operator.truediv},
    **{"floor_divide": operator.floordiv, "__floordiv__": operator.floordiv},
    **{"remainder": operator.mod, "__mod__": operator.mod},
    **{"__and__": operator.and_, "bitwise_and": operator.and_},
    **{"__or__": operator.or_, "bitwise_or": operator.or_},
    **{"__xor__": operator.xor, "bitwise_xor": operator.xor},
    **{"__lshift__": operator.lshift, "__rshift__": operator.rshift},
    **{"neg": operator.neg, "__invert__": operator.invert, "bitwise_not": operator.invert},
    **{"__getitem__": operator.getitem, "__setitem__": operator.setitem},
}
_REFLECTED: dict[str, Callable[..., Any]] = {
    **{"__rsub__": operator.sub, "__rdiv__": operator.truediv, "__rtruediv__": operator.truediv},
    **{"__rpow__": operator.pow, "__rmatmul__": operator.matmul, "__rmod__": operator.mod},
    **{"__rfloordiv__": operator.floordiv, "__radd__": operator.add, "__rmul__": operator.mul},
}
_UNARY = ("neg", "__invert__", "bitwise_not")
# Attributes of a tensor that are tensors; what else is read of it is known while recording.
_ATTRIBUTES = {getattr(Tensor, name).__get__: name for name in ("T", "mT", "H", "mH", "data")}
# Keywords that say nothing where they are None or False.
_DEFAULTS = ("device", "dtype", "layout", "pin_memory", "requires_grad", "out", "memory_format")


@dataclass(frozen=True)
class Call:
    """A node to be: ``op`` and ``target`` as torch.fx has them, operands still tensors."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def name_of(function: Any) -> str:
    """``add_`` for Tensor.add_, empty for what has no name."""
    return str(getattr(function, "__name__", ""))


def is_method(function: Any) -> bool:
    """Whether ``function`` is a method of tensors."""
    return getattr(Tensor, name_of(function), None) is function


def spelled(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The node that a call of ``function`` becomes."""
    kwargs = {k: v for k, v in kwargs.items() if not (k in _DEFAULTS and v in (None, False))}
    if function in _ATTRIBUTES:
        return Call("call_function", getattr, (args[0], _ATTRIBUTES[function]), {})
    if not is_method(function):
        return Call("call_function", function, args, kwargs)
    return method(name_of(function), args, kwargs)


def method(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The node that a call of the method ``name`` becomes."""
    if name in _REFLECTED:
        return Call("call_function", _REFLECTED[name], (args[1], args[0]), {})
    operands = 1 if name in _UNARY else 3 if name == "__setitem__" else 2
    if name in _OPERATORS and len(args) == operands and not kwargs:
        return Call("call_function", _OPERATORS[name], args, {})
    return Call("call_method", name, args, kwargs)


def out_of_place(name: str) -> str | None:
    """``add`` for ``add_``, ``__and__`` for ``__iand__``; None where there is no such method."""
    plain = f"__{name[3:]}" if name.startswith("__i") and name != "__invert__" else ""
    plain = plain or (name[:-1] if name.endswith("_") and not name.endswith("__") else "")
    return plain if plain in _OPERATORS or hasattr(Tensor, plain or "?") else None
