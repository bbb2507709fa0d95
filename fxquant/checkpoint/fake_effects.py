"""What a call on fakes does besides making a value: writes, and views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from fxquant.checkpoint.size_numbers import SEQUENCES


class Effects(NamedTuple):
    """``writes``: into an operand; ``shares``: what is made lies, in part, in an operand."""

    writes: bool
    shares: bool


def watched_call(call: Callable[[], Any], operands: Any) -> tuple[Any, Effects]:
    """What ``call`` makes of ``operands``, and what it did; raises whatever it does."""
    given = list(_tensors(operands))
    versions = [each._version for each in given]
    value = call()
    writes = [each._version for each in given] != versions
    shares = not _storages(given).isdisjoint(_storages(_tensors(value)))
    return value, Effects(writes, shares)


def _storages(tensors: Any) -> set[int]:
    return {each.untyped_storage()._cdata for each in tensors}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, SEQUENCES):
        for each in value:
            yield from _tensors(each)
