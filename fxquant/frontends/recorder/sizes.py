"""Sizes as nodes: every expression over batch and length becomes arithmetic on their sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import sympy
from torch import SymFloat, SymInt, Tensor
from torch.fx import Node

from fxquant.errors import TracingError

Add = Callable[..., Node]
# Of torch.utils._sympy.functions and sympy: classes by name, several stand for one function.
_BINARY: dict[str, Callable[..., Any]] = {
    **{"FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv, "Pow": operator.pow},
    **{"Mod": operator.mod, "PythonMod": operator.mod, "PowByNatural": operator.pow},
    **{"FloatTrueDiv": operator.truediv, "IntTrueDiv": operator.truediv},
}
_FOLDED: dict[str, Callable[..., Any]] = {
    **{"Add": operator.add, "Mul": operator.mul},
    **{"Max": max, "Min": min},
}


class Sizes:
    """Nodes of sizes, each expression once.

    Args:
        add: makes a node of op, target and args.
        input_ids: the fake tensor [batch, length] and its node.
    """

    def __init__(self, add: Add, input_ids: Tensor, node: Node) -> None:
        self._add = add
        self._known: dict[Any, Any] = {}
        for dim, size in enumerate(input_ids.shape):
            assert isinstance(size, SymInt)
            self._known[size.node.expr] = add("call_method", "size", (node, dim))

    def node_of(self, size: SymInt | SymFloat) -> Any:
        """The node, or the number, that ``size`` is."""
        return self._expression(sympy.sympify(size.node.expr))

    def _expression(self, expression: Any) -> Any:
        if expression not in self._known:
            self._known[expression] = self._made(expression)
        return self._known[expression]

    def _made(self, expression: Any) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression.is_Rational or expression.is_Float:
            return float(expression)
        kind = type(expression).__name__
        # Numbers last: length + 1, as people write it.
        ordered = sorted(expression.args, key=lambda part: (part.is_number, str(part)))
        if kind in _FOLDED:
            parts = [self._expression(part) for part in ordered]
            return reduce(lambda a, b: self._apply(_FOLDED[kind], a, b), parts)
        if kind in _BINARY:
            return self._apply(_BINARY[kind], *(self._expression(p) for p in expression.args))
        if kind == "ToFloat":
            return self._apply(float, self._expression(expression.args[0]))
        raise TracingError(f"a size is {expression}, which depends on more than batch and length")

    def _apply(self, function: Callable[..., Any], *args: Any) -> Any:
        if any(isinstance(arg, Node) for arg in args):
            return self._add("call_function", function, args)
        return function(*args)
