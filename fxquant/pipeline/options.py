"""Options of passes, checked against the annotations of their dataclass fields.

Text and Python alike: ``refine(steps=1.5)`` and ``Refine(steps=1.5)`` are one error, raised before
any work. A bound stands in the annotation: ``steps: Annotated[int, Bounds(low=1)] = 4``.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from fxquant.errors import SchemeError
from fxquant.schemes.spelling import has_spelling, shown


@dataclass(frozen=True)
class Bounds:
    """Where a number may lie: from ``low`` to ``high``, both inside, or ``above`` one that is
    outside."""

    low: float | None = None
    high: float | None = None
    above: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
        )

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"from {self.low} to {self.high}"
        ends = (("of at least", self.low), ("above", self.above), ("of at most", self.high))
        return " and ".join(f"{words} {end}" for words, end in ends if end is not None)


Count = Annotated[int, Bounds(low=1)]
Rounds = Annotated[int, Bounds(low=1, high=1000)]  # of a repair that repeats itself
Share = Annotated[float, Bounds(low=0, high=1)]
Positive = Annotated[float, Bounds(above=0)]
Seed = Annotated[int, Bounds(low=0, high=2**63 - 1)]


def check_options(options: Any, name: str) -> None:
    """Raise SchemeError for the first field of a dataclass whose value its annotation rules out.

    An int may stand where a float is annotated; a bool is no number; numbers are finite, and whole
    ones have a spelling, so that the pass is read again from where it is written down.
    """
    hints = typing.get_type_hints(type(options), include_extras=True)
    for each in fields(options):
        value = getattr(options, each.name)
        if not fits(hints[each.name], value):
            raise SchemeError(
                f"{name}: {each.name} must be {allowed(hints[each.name])}, got {shown(value)}"
            )
        if isinstance(value, int) and not has_spelling(value):
            raise SchemeError(
                f"{name}: {each.name} must be a number of at most 64 bits, got {shown(value)}"
            )


def fits(hint: Any, value: Any) -> bool:
    """Whether the value is what the annotation allows; a list may be any sequence or set."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return fits(arguments[0], value) and all(
            value in bounds for bounds in arguments[1:] if isinstance(bounds, Bounds)
        )
    if origin in (typing.Union, types.UnionType):
        return any(fits(each, value) for each in arguments)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and _fits_each(arguments, value)
    if origin is Sequence and arguments != (Any,):
        listed = isinstance(value, Sequence | Set) and not isinstance(value, str | bytes)
        return listed and all(fits(arguments[0], each) for each in value)
    if hint in (int, float):
        kinds = (int, float) if hint is float else (int,)
        return isinstance(value, kinds) and not isinstance(value, bool) and _is_finite(value)
    return hint is Any or isinstance(value, origin or hint)


def _fits_each(hints: tuple[Any, ...], values: tuple[object, ...]) -> bool:
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = hints[:1] * len(values)
    return len(hints) == len(values) and all(map(fits, hints, values))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def allowed(hint: Any) -> str:
    """What the annotation allows, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = (str(each) for each in arguments[1:] if isinstance(each, Bounds))
        return " ".join((allowed(arguments[0]), *bounds))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(allowed(each) for each in arguments)
    if origin is Literal:
        *others, last = (str(each) for each in arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if origin is tuple:
        each = " and ".join(allowed(each) for each in arguments if each is not Ellipsis)
        return f"a tuple of {each}"
    if origin is Sequence:
        return f"a list of {allowed(arguments[0]).removeprefix('a ')}"
    if origin is Callable:
        return "a function"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return "none" if hint is type(None) else words.get(hint, f"a {getattr(hint, '__name__', hint)}")
