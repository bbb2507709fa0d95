"""Locks of files and folders, which the operating system lets go when their process ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fxquant.errors import FxquantError, WriteError
from fxquant.files.doors import Location, as_path

LOCK = ".lock"
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


def reason(error: Exception) -> str:
    """What an error says, without the number and the name of a temporary file."""
    return getattr(error, "strerror", None) or str(error) or repr(error)


def take(path: Path) -> int:
    """A descriptor of the file at ``path``, made where there is none; its lock lasts until it is
    closed. Raises BlockingIOError where another descriptor has it, OSError where it cannot be."""
    while True:
        handle = os.open(path, _FLAGS, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder has removed or renamed it in between: take the new one


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def hold(path: Path, what: str, kind: type[FxquantError] = WriteError) -> Iterator[None]:
    """Until the block ends, the lock file at ``path`` is this run's; it names process and host.

    A run that was killed holds nothing. Raises ``kind``, about ``what``, where another run (or
    another thread) holds it, naming that, or where the file cannot be written.
    """
    try:
        handle = take(path)
    except BlockingIOError as error:
        raise kind(
            f"another process is writing to {what}{_holder(path)}: wait until it has ended, or "
            "give another place"
        ) from error
    except OSError as error:
        raise kind(f"cannot write to {what}: {reason(error)}") from error
    try:
        try:
            _sign(handle)
        except OSError as error:
            raise kind(f"cannot write to {what}: {reason(error)}") from error
        yield
    finally:
        with contextlib.suppress(OSError):
            if _is_at(handle, path):
                path.unlink()
        os.close(handle)


def _sign(handle: int) -> None:
    """Say who holds it; that a few bytes fit is worth knowing before any work."""
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def _holder(path: Path) -> str:
    try:
        text = " ".join(path.read_text(encoding="utf-8", errors="replace")[:200].split())
    except OSError:
        return ""
    return f" ({text})" if text.isprintable() and text else ""


@contextlib.contextmanager
def hold_folder(folder: Path | None, what: str = "output folder") -> Iterator[None]:
    """``folder`` is made, and is this run's until the block ends; None: nothing to hold.

    A folder that was made for nothing is removed. Raises WriteError as ``hold`` does.
    """
    if folder is None:
        yield
        return
    new = not folder.exists()
    _make(folder, what)
    try:
        with hold(folder / LOCK, f"{what} {folder}"):
            yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def check_writable(folder: Path, what: str = "output folder") -> None:
    """Make ``folder``; WriteError where no file can be written there."""
    _make(folder, what)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\n")
    except OSError as error:
        raise WriteError(f"cannot write to {what} {folder}: {reason(error)}") from error


def writable(given: Location | None, what: str) -> Path | None:
    """The folder that a user's argument called ``what`` names, made; None stays None. WriteError
    for what is no path, and where no file can be written there."""
    if given is None:
        return None
    folder = as_path(given, what, WriteError)
    check_writable(folder, f"{what} folder")
    return folder


def _make(folder: Path, what: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot write to {what} {folder}: {reason(error)}") from error
