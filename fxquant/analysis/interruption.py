"""What is said when an analysis is interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fxquant.analysis.store import Store


@contextmanager
def kept(store: Store) -> Iterator[None]:
    """An interruption inside the block carries a note on how many losses are finished."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(f"{len(store.values)} finished losses")
        raise
