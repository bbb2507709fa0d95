"""What a command prints: errors of printing are ours too, notices are one line."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from fxquant.errors import CacheWarning, WriteError
from fxquant.files.locks import reason


class _Checked:
    """A stream whose errors of writing are WriteErrors, and which is written whatever its encoding:
    a letter that it has not, such as Δ in ASCII, as its code."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _checked():
            return self._stream.write(self._encodable(text))

    def _encodable(self, text: str) -> str:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            return text.encode(encoding, "backslashreplace").decode(encoding)
        return text

    def flush(self) -> None:
        with _checked():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Tried:
    """A stream for what is said on the way: where it cannot be written, the work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _give_up(self._stream)
            return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def saying() -> Iterator[None]:
    """Within the block standard error that cannot be written (a full disk) stops nothing."""
    if sys.stderr is None:  # closed
        yield
        return
    with contextlib.redirect_stderr(_Tried(sys.stderr)):
        yield


@contextlib.contextmanager
def _checked() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"cannot write to standard output: {reason(error)}; what --output names is kept"
        ) from error


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Within the block standard output that cannot be written (a full disk, a closed pipe) is a
    WriteError, at its end at the latest, and a CacheWarning is a line on stderr."""
    stream, shown = sys.stdout, warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **rest: Any) -> None:
        if issubclass(category, CacheWarning):
            print(f"fxquant: note: {message}", file=sys.stderr)
        else:
            shown(message, category, *where, **rest)

    with warnings.catch_warnings(), contextlib.redirect_stdout(_Checked(stream)):
        warnings.showwarning = show
        try:
            yield
            sys.stdout.flush()
        except WriteError:
            _give_up(stream)
            raise


def _give_up(stream: TextIO) -> None:
    """Where the stream is broken, let what it still holds go nowhere when Python ends."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
