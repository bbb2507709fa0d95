"""Random changes to JSON values: one place gets another value, or goes."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 7, 10**400, -1e308, 0.5, float("nan"), float("inf"), "", "x", "nan",
    "\ud800", "\0", "9" * 5000, [], [[]], [1, "a"], {}, {"a": {"b": []}}, [None],
)  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with every key or index of it."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


def mutated(value: Any, rng: random.Random, count: int = 1) -> Any:
    """A copy with ``count`` changes."""
    changed = copy.deepcopy(value)
    for _ in range(count):
        found = list(places(changed))
        if not found:
            return changed
        container, key = rng.choice(found)
        if rng.random() < 0.2:
            del container[key]
        else:
            container[key] = copy.deepcopy(rng.choice(WRONG))
    return changed
