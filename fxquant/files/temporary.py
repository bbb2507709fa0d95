"""Folders for what is needed for a while, in the one that TMPDIR names."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fxquant.errors import FxquantError, WriteError
from fxquant.files.locks import reason


@contextlib.contextmanager
def temporary_folder(what: str, error: type[FxquantError] = WriteError) -> Iterator[Path]:
    """A new folder, gone with the block; ``error`` where none can be made.

    ``what`` says what it is for, such as "results lie there"."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="fxquant-", ignore_cleanup_errors=True)
    except OSError as failure:
        place = Path(tempfile.tempdir or os.environ.get("TMPDIR", "/tmp"))
        raise _no_room(place / "fxquant-*", what, failure, error) from failure
    with folder as name:
        yield Path(name)


@contextlib.contextmanager
def room_for(path: Path, what: str, error: type[FxquantError] = WriteError) -> Iterator[None]:
    """``error`` where the block, which writes ``path`` below a temporary folder, cannot."""
    try:
        yield
    except (OSError, SafetensorError) as failure:
        raise _no_room(path, what, failure, error) from failure


def _no_room(path: Path, what: str, failure: Exception, error: type[FxquantError]) -> FxquantError:
    return error(
        f"cannot write {path}: {reason(failure)}; {what} for a while: make room, or name another "
        "folder in TMPDIR"
    )
