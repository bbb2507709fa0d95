"""Files of one JSON object a line that are only ever appended to, so that a run can go on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from fxquant.errors import DataError, WriteError
from fxquant.files.locks import hold, reason

T = TypeVar("T")


@dataclass(frozen=True)
class LineKind(Generic[T]):
    """What the lines of a file are.

    ``parse`` makes something of one line or raises ValueError; ``wrong`` is what a damaged line
    is, ``again`` what is done without it: both for the error. ``plural``: what the file holds.
    """

    parse: Callable[[str], T]
    plural: str
    wrong: str
    again: str


def complete_length(content: bytes) -> int:
    """Bytes of the lines that have their newline: a last one without was being written."""
    return content.rfind(b"\n") + 1


def parse_lines(content: bytes, path: Path, kind: LineKind[T]) -> list[T]:
    """The complete lines of ``content``; DataError naming ``path`` and the line that is damaged."""
    found: list[T] = []
    for number, line in enumerate(content[: complete_length(content)].split(b"\n")[:-1], 1):
        try:
            found.append(kind.parse(line.decode("utf-8")))
        except ValueError as error:
            raise _damaged(path, number, kind, error) from error
    return found


def _damaged(path: Path, number: int, kind: LineKind[Any], error: Exception) -> DataError:
    return DataError(
        f"{path}, line {number} is {kind.wrong} ({error}); move the file away, or delete the line "
        f"to have {kind.again} again"
    )


class LineFile(Generic[T]):
    """An open file of lines, locked against a second writer; ``lines``: those that were there.

    A last line that was cut off by an interruption is cut away; nothing else of the file is ever
    written again. On leaving the block file and lock are let go.
    """

    def __init__(self, path: Path, kind: LineKind[T]) -> None:
        self.path, self.kind = path, kind
        self.lines: list[T] = []
        self._count = self._size = 0
        self._handle: int | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> LineFile[T]:
        """Raises DataError for a damaged line, WriteError where the file cannot be written or is
        in the hands of another process."""
        with contextlib.ExitStack() as opening:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._unwritable(reason(error)) from error
            opening.enter_context(hold(self._lock, str(self.path)))
            try:
                if self.path.exists() and not self.path.is_file():
                    raise self._unwritable("it is no regular file")
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                opening.callback(os.close, handle)
                content = self.path.read_bytes()
                self.lines = parse_lines(content, self.path, self.kind)
                self._handle, self._count = handle, len(self.lines)
                self._cut(content)
            except OSError as error:
                raise self._unwritable(reason(error)) from error
            self._open = opening.pop_all()
        return self

    @property
    def _lock(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")

    def _unwritable(self, what: str) -> WriteError:
        return WriteError(f"cannot write {self.kind.plural} to {self.path}: {what}")

    def _cut(self, content: bytes) -> None:
        """Cut a torn last line; DataError where it is none of ours."""
        assert self._handle is not None
        self._size = complete_length(content)
        torn = content[self._size :]
        if not torn.startswith(b'{"'[: len(torn)]):
            error = ValueError("it has no end and is not the beginning of one either")
            raise _damaged(self.path, self._count + 1, self.kind, error)
        if torn:
            os.ftruncate(self._handle, self._size)

    def __exit__(self, *raised: object) -> None:
        self._handle = None
        self._open.close()

    def append(self, line: str) -> None:
        """Keep a line; on return it is on the disk. WriteError where it cannot be kept; the lines
        before it are then as they were."""
        assert self._handle is not None, "the file is not open"
        # A lone surrogate, as names of files may hold, becomes its escape, which JSON reads.
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        try:
            written = 0
            while written < len(data):
                written += os.write(self._handle, data[written:])
            os.fsync(self._handle)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self._size)
            raise self._unwritable(
                f"{reason(error)}; the {self._count} before are kept there, and the same command "
                "goes on from them when it can write again"
            ) from error
        self._size += len(data)
        self._count += 1
