"""How large the Python numbers of a graph may become, whatever the batch and the length are.

A graph computes sizes: picked from shapes, added, multiplied by a few constants. Every number has
a bound that holds for all inputs, so that none is small at the sizes that are tried and immense at
others; arithmetic that no size needs is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

SEQUENCES = (torch.Size, tuple, list)
_LINEAR, _SQUARE = 2**17, 2**6  # the largest coefficients: a vocabulary's, and a few
IN_PLACE = (operator.setitem, operator.iadd)
# What always makes a tensor of its own, of any operands.
_FRESH = {
    *(torch.clone, torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.tensor),
    *(torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.cat, torch.stack),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul),
}
_FRESH_METHODS = {"clone", "new_zeros", "new_ones", "new_full", "new_empty", "masked_fill"}


@dataclass(frozen=True)
class Bound:
    """A number is at most ``weight`` times the ``degree``-th power of the largest extent."""

    weight: int = 1
    degree: int = 0


_EXTENT = Bound(1, 1)
_STRIDE = Bound(_SQUARE, 2)  # a product of extents


def bound_of(value: Any, bounds: Mapping[Node, Bound]) -> Bound:
    """The largest of what is among an operand's literals and nodes."""
    if isinstance(value, Node):
        return bounds.get(value, Bound())
    if isinstance(value, list | tuple):
        found = [bound_of(item, bounds) for item in value]
        return Bound(
            max((each.weight for each in found), default=1),
            max((each.degree for each in found), default=0),
        )
    if isinstance(value, slice):
        return bound_of((value.start, value.stop, value.step), bounds)
    return Bound(max(1, abs(value))) if type(value) is int else Bound()


def check_numbers(node: Node, args: tuple[Any, ...], bounds: Mapping[Node, Bound]) -> Bound:
    """The bound of what ``node`` computes, where that is a number or a sequence of them.

    ``args``: the values of its operands. Raises TypeError for an operator on Python's numbers and
    sequences that no size needs, OverflowError for a number that may outgrow every size.
    """
    if node.op == "call_method":
        return _STRIDE if node.target == "stride" else _EXTENT
    function = node.target
    if node.op != "call_function" or getattr(function, "__module__", "") != "_operator":
        return _EXTENT
    if function in IN_PLACE:
        _check_target(node, args)
    if any(isinstance(operand, Tensor) for operand in args):
        _check_index(function, node.args)
        return _EXTENT
    return _sequence(node, args, bounds) or _arithmetic(node, args, bounds)


def _check_target(node: Node, args: tuple[Any, ...]) -> None:
    """In place only where no stored tensor can lie behind it, at any size."""
    target = node.args[0]
    fresh = isinstance(target, Node) and (
        (target.op == "call_function" and target.target in _FRESH)
        or (target.op == "call_method" and target.target in _FRESH_METHODS)
    )
    if not (isinstance(args[0], Tensor) and fresh):
        raise TypeError("writes into what may be a stored tensor or an input; clone it before")


def _check_index(function: object, operands: tuple[Any, ...]) -> None:
    if function is operator.getitem and not isinstance(operands[0], Node):
        raise TypeError("picks from a written sequence by a tensor")


def _sequence(node: Node, args: tuple[Any, ...], bounds: Mapping[Node, Bound]) -> Bound | None:
    """getitem by a written index, and joining; None if the operands are no sequences."""
    if not isinstance(args[0], SEQUENCES):
        return None
    index = node.args[1] if len(args) == 2 else None
    parts = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
    written = all(part is None or type(part) is int for part in parts) and index is not None
    if node.target is operator.getitem and written:
        return bound_of(node.args[0], bounds)
    if node.target is operator.add and len(args) == 2 and isinstance(args[1], SEQUENCES):
        return bound_of(node.args, bounds)
    kinds = ", ".join(type(operand).__name__ for operand in args)
    raise TypeError(f"{getattr(node.target, '__name__', node.target)} of {kinds}")


def _arithmetic(node: Node, args: tuple[Any, ...], bounds: Mapping[Node, Bound]) -> Bound:
    name = getattr(node.target, "__name__", str(node.target))
    if node.target is operator.pow and _is_root(node, args, bounds):
        return bound_of(node.args[0], bounds)
    if len(args) != 2 or not all(type(operand) is int for operand in args):
        kinds = ", ".join(type(operand).__name__ for operand in args)
        raise TypeError(f"{name} of {kinds}, which sizes do not need")
    one, other = (bound_of(operand, bounds) for operand in node.args)
    if node.target in (operator.add, operator.sub):
        found = Bound(one.weight + other.weight, max(one.degree, other.degree))
    elif node.target is operator.mul:
        found = Bound(one.weight * other.weight, one.degree + other.degree)
    elif node.target is operator.floordiv and type(node.args[1]) is int and node.args[1] > 0:
        found = one
    else:
        raise TypeError(
            f"{name} of Python's numbers: sizes are added, multiplied and divided by constants"
        )
    if found.degree > 2 or found.weight > (_SQUARE if found.degree == 2 else _LINEAR):
        raise OverflowError(f"{name} may make a number beyond any size")
    return found


def _is_root(node: Node, args: tuple[Any, ...], bounds: Mapping[Node, Bound]) -> bool:
    """``extent ** -0.5`` and the like: of an extent as it is, which is not 0."""
    exponent = node.args[1] if len(args) == 2 else None
    plain = type(args[0]) is int and args[0] > 0 and bound_of(node.args[0], bounds) == _EXTENT
    return plain and type(exponent) is float and abs(exponent) <= 1
