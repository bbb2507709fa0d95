"""Frozen dataclasses as JSON values and back, guided by their annotations.

The file names no types: what a value becomes is said by the annotation of the field it stands
in, so fields and dataclasses may be added (with defaults) and older files still load.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from typing import Any

from fxquant.errors import CheckpointError
from fxquant.formats.grid import Grid
from fxquant.formats.scales import ScaleFormat
from fxquant.formats.table import GRIDS, SCALES

PRIMITIVES = (str, bool, int, float, type(None))


def to_json(value: object) -> Any:
    """Dataclasses, enums, number formats (their names), tuples, dicts with text keys and primitives
    as JSON values.

    Raises CheckpointError for any other type.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, Grid | ScaleFormat | type):
        fields = dataclasses.fields(value)
        return {field.name: to_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Grid | ScaleFormat):
        return value.name
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, PRIMITIVES):
        return value
    raise CheckpointError(f"a {type(value).__name__} cannot be saved: {value!r}")


def from_json(hint: Any, data: Any) -> Any:
    """What ``to_json`` was given, where ``hint`` is its annotation; CheckpointError if it is not.

    Fields that ``data`` lacks take their defaults; unknown ones are an error.
    """
    if hint is Grid:
        return _checked(hint, data, lambda: GRIDS[data])
    if hint is ScaleFormat:
        return _checked(hint, data, lambda: SCALES[data])
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _record(hint, data)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _checked(hint, data, lambda: hint(data))
    if origin in (typing.Union, types.UnionType):
        return _first(arguments, data)
    if origin is typing.Literal:
        return _checked(hint, data, lambda: arguments[arguments.index(data)])
    if origin is tuple and isinstance(data, list):
        return _tuple(hint, arguments, data)
    if origin is dict and isinstance(data, dict):
        return {key: from_json(arguments[1], item) for key, item in data.items()}
    if hint is float and type(data) in (int, float):
        return float(data)
    if hint in PRIMITIVES and type(data) is hint:
        return data
    raise CheckpointError(f"expected {hint}, found {str(data)[:60]!r}")


def _checked(hint: Any, data: Any, build: typing.Callable[[], Any]) -> Any:
    try:
        return build()
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"expected {hint}, found {str(data)[:60]!r}: {error}") from error


def _record(kind: type, data: Any) -> Any:
    if not isinstance(data, dict):
        raise CheckpointError(f"expected the fields of {kind.__name__}, found {str(data)[:60]!r}")
    hints = _hints(kind)
    unknown = set(data) - set(hints)
    if unknown:
        raise CheckpointError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    values = {name: from_json(hints[name], item) for name, item in data.items()}
    return _checked(kind, data, lambda: kind(**values))


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotation of each field; found again for every record they take most of a load."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _tuple(hint: Any, arguments: tuple[Any, ...], data: list[Any]) -> tuple[Any, ...]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(from_json(arguments[0], item) for item in data)
    if len(arguments) != len(data):
        raise CheckpointError(f"expected {hint}, found {len(data)} items")
    return tuple(from_json(each, item) for each, item in zip(arguments, data, strict=True))


def _first(alternatives: tuple[Any, ...], data: Any) -> Any:
    # An int is also a float, but not the other way round: exact types first.
    exact = [hint for hint in alternatives if hint is type(data)]
    for hint in (*exact, *alternatives):
        try:
            return from_json(hint, data)
        except CheckpointError:
            continue
    raise CheckpointError(f"expected one of {alternatives}, found {str(data)[:60]!r}")
