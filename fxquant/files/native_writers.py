"""A file for native code that is not made for writes that fail.

torch's archive writer ends the process on a full disk: its destructor writes on, and throws again.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


class _Held(io.RawIOBase):
    """Takes every write; the first that fails is kept, and nothing is written behind it."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        if self.failure is None:
            self._try(lambda: self._file.write(data))
        return memoryview(data).nbytes

    def close(self) -> None:
        self._try(self._file.close)
        super().close()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True  # torch winds it back when all is written

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            self.failure = self.failure or error


@contextlib.contextmanager
def held_errors(path: Path) -> Iterator[Any]:
    """A new file at ``path`` to be written from its start to its end; OSError once the block ends
    where a write in it has failed."""
    file = _Held(path.open("wb"))
    try:
        with file:
            yield file
    finally:
        if file.failure is not None:
            raise file.failure
