"""The folder that a checkpoint or an export is written to: one writer at a time, nothing left of a
killed one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fxquant.errors import CheckpointError, FxquantError
from fxquant.files.locks import hold


@contextlib.contextmanager
def held_target(target: Path | None, error: type[FxquantError] = CheckpointError) -> Iterator[None]:
    """``target`` is this run's until the block ends, which saves there; None: nothing to hold.

    Raises ``error`` where another run holds it, or its parent folder cannot be written.
    """
    if target is None:
        yield
        return
    place = _place(target)
    with hold(place.parent / f".{place.name}.lock", str(target), error):
        yield


def _place(target: Path) -> Path:
    """Where a link leads, so that a folder with two names has one writer and stays where it is."""
    return Path(os.path.realpath(target)) if target.is_symlink() else target


@contextlib.contextmanager
def saving(target: Path, error: type[FxquantError] = CheckpointError) -> Iterator[None]:
    """As ``held_target``, for the time of one save, inside of it or not.

    What a save that was killed left beside ``target`` is removed; an earlier checkpoint that it
    had moved away already is moved back.
    """
    given, target = target, _place(target)
    with hold(target.parent / f".{target.name}.saving.lock", str(given), error):
        for kind in ("old", "partial"):
            pattern = re.compile(rf"\.{re.escape(target.name)}\.{kind}-[a-z0-9_]{{8}}")
            for left in filter(lambda path: pattern.fullmatch(path.name), target.parent.iterdir()):
                if kind == "old" and not target.exists() and (left / target.name).exists():
                    (left / target.name).rename(target)
                shutil.rmtree(left, ignore_errors=True)
        yield


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, gone with the block: Ctrl-C too must not leave half of what
    is written behind."""
    target = _place(target)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, target: Path) -> None:
    """Let ``partial`` be ``target``; what stands there goes once it does."""
    target = _place(target)
    partial.chmod(0o755)  # mkdtemp's is private
    if not target.exists():
        partial.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old / target.name)
    try:
        partial.rename(target)
    except OSError:
        (old / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def is_empty(directory: Path) -> bool:
    """Whether it is a folder with nothing in it."""
    return directory.is_dir() and not any(directory.iterdir())
