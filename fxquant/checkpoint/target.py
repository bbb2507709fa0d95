"""The place that a checkpoint is saved to: one writer at a time, nothing left of a killed one."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from fxquant.errors import CheckpointError
from fxquant.files.locks import hold


@contextlib.contextmanager
def held_target(target: Path | None) -> Iterator[None]:
    """``target`` is this run's until the block ends, which saves there; None: nothing to hold.

    Raises CheckpointError where another run holds it, or its parent folder cannot be written.
    """
    if target is None:
        yield
        return
    with hold(target.parent / f".{target.name}.lock", str(target), CheckpointError):
        yield


@contextlib.contextmanager
def saving(target: Path) -> Iterator[None]:
    """As ``held_target``, for the time of one save, inside of it or not.

    What a save that was killed left beside ``target`` is removed; an earlier checkpoint that it
    had moved away already is moved back.
    """
    with hold(target.parent / f".{target.name}.saving.lock", str(target), CheckpointError):
        for kind in ("old", "partial"):
            pattern = re.compile(rf"\.{re.escape(target.name)}\.{kind}-[a-z0-9_]{{8}}")
            for left in filter(lambda path: pattern.fullmatch(path.name), target.parent.iterdir()):
                if kind == "old" and not target.exists() and (left / target.name).exists():
                    (left / target.name).rename(target)
                shutil.rmtree(left, ignore_errors=True)
        yield
