"""results.jsonl: one result a line, appended and synced, that survives any interruption."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

from fxquant.doors import parse_json, read_bytes, reason
from fxquant.errors import DataError
from fxquant.evaluation.decoding import decode
from fxquant.evaluation.protocol import Protocol
from fxquant.evaluation.provenance import Provenance
from fxquant.evaluation.results import Row, check_scheme

FORMAT: Final = 1


@dataclass(frozen=True)
class Result:
    """One cell of a sweep: what it was, and its figures or its error.

    ``fingerprint``: of everything that determines the figures. ``seed`` None: they do not depend on
    one. ``protocol``, ``figures`` and ``provenance`` are None where ``error`` is not.
    """

    fingerprint: str
    model: str
    scheme: str
    dataset: str
    seed: int | None
    protocol: Protocol | None = None
    figures: Row | None = None
    provenance: Provenance | None = None
    error: str | None = None

    def to_line(self) -> str:
        """One line of strict JSON: ``figures`` has Row's fields, numbers that are not finite are
        null, and ``format`` is the version of all this."""
        data = {"format": FORMAT, **asdict(self)}
        data["figures"] = None if self.figures is None else self.figures.to_json()
        return json.dumps(data, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_line(cls, line: str) -> Result:
        """The inverse of to_line. Raises ValueError for other text."""
        data = parse_json(line, strict=True)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"its format is not this version's {FORMAT}")
        parts: dict[str, Any] = dict.fromkeys(("protocol", "figures", "provenance"))
        if data.get("figures") is not None:
            parts["figures"] = Row.from_json(data["figures"], "figures")
        if data.get("provenance") is not None:
            parts["provenance"] = Provenance.from_json(data["provenance"], "provenance")
        if data.get("protocol") is not None:
            parts["protocol"] = decode(Protocol, data["protocol"], "protocol")
        result = decode(cls, data, **parts)
        check_scheme(result.scheme, "scheme")
        return result


def read_journal(path: Path) -> list[Result]:
    """The results in a results.jsonl, the last line of each fingerprint, in order of appearance.

    A last line without its newline was being written when the run was killed: it does not count.
    Raises DataError for a file that cannot be read and for any other damage, with its line.
    """
    return parse_journal(read_bytes(path), path)


def parse_journal(content: bytes, path: Path) -> list[Result]:
    """As read_journal, of the content of the file at ``path``."""
    return list(_parse(content[: _complete(content)], path).values())


def _complete(content: bytes) -> int:
    """Length of the lines that have their newline."""
    return content.rfind(b"\n") + 1


def _parse(content: bytes, path: Path) -> dict[str, Result]:
    found: dict[str, Result] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            result = Result.from_line(line.decode("utf-8"))
        except ValueError as error:
            raise DataError(
                f"{path}, line {number} is no result of this version ({reason(error)}); move the "
                "file away, or delete the line to have its cell done again"
            ) from error
        found[result.fingerprint] = result
    return found


class Journal:
    """An open results.jsonl, locked against a second writer; ``results`` by fingerprint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Result] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> Journal:
        """Raises DataError where the file cannot be written, is damaged or in another's hands."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+b")
        except OSError as error:
            raise DataError(f"cannot write results to {self.path}: {error}") from error
        try:
            self._take(file)
        except BaseException:
            file.close()
            raise
        self._file = file
        return self

    def _take(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another process is writing to {self.path}") from error
        file.seek(0)
        content = file.read()
        complete = _complete(content)
        self.results = _parse(content[:complete], self.path)
        file.truncate(complete)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, result: Result) -> None:
        """Keep a result; on return it is on the disk."""
        assert self._file is not None, "the journal is not open"
        self._file.write(result.to_line().encode("utf-8") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.results[result.fingerprint] = result
