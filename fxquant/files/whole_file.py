"""Files that are written whole: beside their name, synced, then moved there in one step."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fxquant.errors import FxquantError, WriteError
from fxquant.files.locks import reason, take


def file_hash(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str, *, what: str = "") -> None:
    """Let ``path`` hold ``text``, UTF-8, in one step; a lone surrogate becomes its escape."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"), what=what)


def write_bytes(
    path: Path, data: bytes, *, what: str = "", error: type[FxquantError] = WriteError
) -> None:
    """Let ``path`` hold ``data``, in one step; what it says when that fails: see ``replacing``.

    A device (/dev/stdout) or a pipe is written to as it is; nobody is waited for to read it.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        try:
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(handle, True)
            with open(handle, "wb") as file:
                file.write(data)
        except OSError as failure:
            raise error(f"cannot write {what}{path}: {reason(failure)}") from failure
        return
    with replacing(path, what=what, error=error) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def replacing(
    path: Path, *, what: str = "", advice: str = "", error: type[FxquantError] = WriteError
) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes the place of ``path`` when the block ends.

    What fails leaves an earlier file at ``path`` as it was, and nothing beside it. Raises
    ``error``: no room, read-only, another process that is writing there. ``what`` stands before
    the path in it ("the report to "), ``advice`` behind.
    """
    partial = path.with_name(f".{path.name}.partial")
    kept = "; the file that is there is unchanged" if os.path.exists(path) else ""
    try:
        handle = take(partial)
    except BlockingIOError as failure:
        raise error(f"another process is writing {what}{path}: wait until it ends") from failure
    except OSError as failure:
        raise error(f"cannot write {what}{path}: {reason(failure)}{kept}{advice}") from failure
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as failure:
        raise error(f"cannot write {what}{path}: {reason(failure)}{kept}{advice}") from failure
    finally:  # Ctrl-C too must not leave half a file behind
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        os.close(handle)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
