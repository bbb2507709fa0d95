"""Typed access to JSON that a file holds: a wrong type is an error that names file and place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxquant.errors import DataError

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def number_or_none(value: object) -> float | None:
    """``value`` as a float if it is a number (not a bool), or one of "nan", "inf", "-inf"."""
    if isinstance(value, str):
        return NON_FINITE.get(value.lower())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


@dataclass(frozen=True)
class Fields:
    """A JSON object at ``where`` in ``file``, read key by key.

    Every method raises DataError when a value is there and has another type than asked for; the
    ones that return None do so only where the key is missing or null.
    """

    file: Path
    where: str
    data: Mapping[str, Any]

    @classmethod
    def of(cls, file: Path, where: str, value: object) -> Fields:
        if not isinstance(value, dict):
            raise _wrong(file, where, "an object", value)
        return cls(file, where, value)

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def text(self, key: str) -> str:
        return str(self._typed(key, str, "text"))

    def text_or_none(self, key: str) -> str | None:
        return self.text(key) if self.has(key) else None

    def number(self, key: str) -> float:
        value = number_or_none(self.data.get(key))
        if value is None:
            raise _wrong(self.file, self._at(key), "a number", self.data.get(key))
        return value

    def number_or_none(self, *keys: str) -> float | None:
        """The number at the first of ``keys`` that is there."""
        for key in keys:
            if self.has(key):
                return self.number(key)
        return None

    def child(self, key: str) -> Fields:
        return Fields.of(self.file, self._at(key), self.data.get(key))

    def children(self, key: str) -> Iterator[Fields]:
        """The objects of the list at ``key``; nothing where it is missing."""
        for index, value in enumerate(self.values(key)):
            yield Fields.of(self.file, f"{self._at(key)}[{index}]", value)

    def values(self, key: str) -> list[Any]:
        """The list at ``key``, empty where it is missing."""
        return list(self._typed(key, list, "a list")) if self.has(key) else []

    def wrong(self, key: str, expected: str) -> DataError:
        """The error to raise where the value at ``key`` is not what the format says."""
        return _wrong(self.file, self._at(key), expected, self.data.get(key))

    def _typed(self, key: str, kind: type, expected: str) -> Any:
        value = self.data.get(key)
        if not isinstance(value, kind):
            raise _wrong(self.file, self._at(key), expected, value)
        return value

    def _at(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key


def _wrong(file: Path, where: str, expected: str, value: object) -> DataError:
    found = "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
    at = f" at {where}" if where else ""
    return DataError(
        f"{file}: expected {expected}{at}, found {found}; write the file again with the command "
        "that made it, or move it out of the folder"
    )
