"""The doors through which files come in: what is read there, and foreign errors as one sentence.

Each library that reads a file raises errors of its own. Where a file is read, ``door`` turns those
that are known to mean a bad file into an FxquantError that names it; any other keeps its traceback,
since it is a bug.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from fxquant.errors import DataError, FxquantError

# What a user may name a file or a folder by.
Location = str | os.PathLike[str]

_LONGEST: Final = 240
_DEEPEST: Final = 100
_TOO_DEEP: Final = f"it is nested more than {_DEEPEST} deep"
# An escaped half of a surrogate pair; whether the other half follows is looked at only then.
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_SAY_THEIR_KIND: Final = (LookupError, AttributeError, TypeError, ArithmeticError, AssertionError)


def reason(error: BaseException) -> str:
    """What an error says, in one line of bounded length, with its kind where that is the news."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else repr(error)
    if lines and isinstance(error, _SAY_THEIR_KIND):
        text = f"{type(error).__name__}: {text}"
    text = printable(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def printable(text: str) -> str:
    """The text without what a terminal obeys or UTF-8 cannot write."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextlib.contextmanager
def door(
    kind: type[FxquantError], doing: str, known: tuple[type[BaseException], ...], advice: str = ""
) -> Iterator[None]:
    """Errors of the ``known`` classes become ``kind``: "``doing``: reason ``advice``".

    ``doing`` names the file that is read. What fxquant raises on purpose passes through.
    """
    try:
        yield
    except FxquantError:
        raise
    except known as error:
        behind = f" ({advice})" if advice else ""
        raise kind(f"{doing}: {reason(error)}{behind}") from error


def as_path(given: Location, what: str, error: type[FxquantError] = DataError) -> Path:
    """``given``, a user's argument called ``what``, as a Path: the door of every path argument."""
    return Path(location(given, what, error))


def location(given: Location, what: str, error: type[FxquantError] = DataError) -> str:
    """As ``as_path``, in the characters that were given, where a name may stand for a path.

    Raises ``error``, naming ``what`` and the value, for what is no path, is empty, cannot be
    written as UTF-8 or holds a NUL, and where the system cannot look at it (too long a name, no
    permission, links in a circle); that nothing is there is no error here.
    """
    text = _fspath(given, what, error)
    if not text:
        raise error(f"{what} is empty: give the path of a file or folder")
    if "\0" in text or not is_utf8(text):
        raise error(f"{what} {_shown(text)} is no text: results could not name it")
    try:
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as looking:
        raise error(f"{what} {_shown(text)} cannot be used: {looking.strerror}") from looking
    return text


def _fspath(given: object, what: str, error: type[FxquantError]) -> str:
    if not isinstance(given, str | os.PathLike):
        value = f" ({given})" if isinstance(given, int | float) else ""
        raise error(
            f"{what} must be a path, as text or a pathlib.Path, not a {type(given).__name__}{value}"
        )
    try:
        found = os.fspath(given)
    except Exception as raised:  # the user's own class
        kind = type(given).__name__
        raise error(f"{what} is a {kind} that gives no path: {reason(raised)}") from raised
    if not isinstance(found, str):
        raise error(f"{what} is a path in bytes, {_shown(found)}: os.fsdecode makes text of it")
    return str(found)


def _shown(value: object) -> str:
    text = printable(repr(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def is_utf8(text: str) -> bool:
    """Whether it can be written down: bytes of another encoding are half characters in Python."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_text(text: str, what: str) -> None:
    """Raise DataError, about ``what``, for text with half a character: nothing can encode it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as encoding:
        raise DataError(
            f"{what} holds half a character, {printable(text[encoding.start])}, at position "
            f"{encoding.start}: read it anew with its right encoding"
        ) from encoding


def check_regular(path: Path, error: type[FxquantError] = DataError) -> Path:
    """``path``, which must be a regular file: a pipe or a device would be read without end.

    Raises ``error`` where it is missing, a folder or anything else.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as reading:
        raise error(f"cannot read {path}: there is no such file") from reading
    except (OSError, ValueError) as reading:
        raise error(f"cannot read {path}: {reason(reading)}") from reading
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file (a pipe or a device)"
        raise error(f"cannot read {path}: it is {what}")
    return path


def near_file(path: Path) -> str:
    """What else lies there under a like name, or that the folder is not there."""
    folder = path.parent
    if not folder.is_dir():
        return f": there is no folder {str(folder)!r}"
    there: list[str] = []
    with contextlib.suppress(OSError):  # a folder that may not be listed
        there = os.listdir(folder)
    near = difflib.get_close_matches(path.name, there, 1, 0.75)
    where = f" in {str(folder.absolute())!r}"
    return f"{where} (did you mean {str(folder / near[0])!r}?)" if near else where


def read_bytes(path: Path, error: type[FxquantError] = DataError) -> bytes:
    """The content of a regular file; raises ``error`` that names it."""
    try:
        return check_regular(path, error).read_bytes()
    except OSError as reading:
        raise error(f"cannot read {path}: {reason(reading)}") from reading


def read_text(path: Path, error: type[FxquantError] = DataError) -> str:
    """The text of a regular UTF-8 file; raises ``error`` that names it, and one of a like name."""
    if not os.path.lexists(path):
        raise error(f"cannot read {path}: there is no such file{near_file(path)}")
    try:
        return read_bytes(path, error).decode("utf-8")
    except UnicodeDecodeError as reading:
        raise error(f"cannot read {path} as UTF-8: {reason(reading)}") from reading


def read_object(path: Path, error: type[FxquantError] = DataError) -> dict[str, Any]:
    """The JSON object in a file; raises ``error`` that names it and what stands there instead."""
    content = read_bytes(path, error)
    try:
        data = parse_json(content)
    except ValueError as reading:
        raise error(f"{path} is no JSON: {reason(reading)}") from reading
    if not isinstance(data, dict):
        raise error(f"{path} must hold a JSON object, found {kind_of(data)}")
    return data


def kind_of(value: object) -> str:
    """A JSON value's kind, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")


def parse_json(
    content: bytes | str,
    *,
    strict: bool = False,
    unique: bool = False,
) -> Any:
    """JSON that can be worked with and written again.

    ``strict``: NaN and Infinity, which Python writes but JSON has not, are refused too.
    ``unique``: so is an object that gives a key twice. Raises ValueError: no JSON or no UTF-8,
    nested too deeply, a number beyond float64, half a character (an unpaired surrogate), which no
    UTF-8 file can hold.
    """
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    try:
        data = json.loads(
            raw.decode("utf-8"),
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_no_constant if strict else None,
            object_pairs_hook=_unique if unique else None,
        )
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_values(data, bool(_SURROGATE.search(raw)))
    return data


def _integer(text: str) -> int:
    if len(text) > 308:
        raise ValueError(f"the number {text[:12]}... of {len(text)} digits is beyond float64")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is beyond float64")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {printable(twice[:40])!r} is given twice")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _check_values(data: object, halves: bool) -> None:
    """Depth, and text where the file holds half characters; without recursion of its own."""
    level: list[object] = [data]
    for _ in range(_DEEPEST):
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.values())
                below.extend(value)
            elif isinstance(value, list):
                below.extend(value)
            elif halves and isinstance(value, str):
                _check_whole(value)
        level = below
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _check_whole(text: str) -> None:
    if not is_utf8(text):
        raise ValueError(f"{printable(text[:40])!r} holds half a character")
