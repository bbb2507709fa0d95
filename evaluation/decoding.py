"""Dataclasses from JSON, checked against their annotations: an error names the field."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, TypeVar

from fxquant.checkpoint.dataclass_json import from_json
from fxquant.errors import CheckpointError

T = TypeVar("T")


def decode(kind: type[T], data: object, where: str = "", **given: object) -> T:
    """``kind`` from what ``dataclasses.asdict`` made of it; keys that are no field are ignored.

    ``where``: the place of ``data`` in its file; ``given``: fields decoded before. Raises
    ValueError that names the place of a field that is missing or of another type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the top'}: expected an object, found {str(data)[:40]!r}")
    hints, values = typing.get_type_hints(kind), dict(given)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in given or (field.name not in data and _has_default(field)):
            continue
        place = f"{where}.{field.name}" if where else field.name
        if field.name not in data:
            raise ValueError(f"{place} is missing")
        try:
            values[field.name] = from_json(hints[field.name], data[field.name])
        except CheckpointError as error:
            raise ValueError(f"{place}: {error}") from error
    return kind(**values)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING
