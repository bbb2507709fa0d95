"""results.jsonl: one result a line, appended and synced, that survives any interruption."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from fxquant.evaluation.decoding import decode
from fxquant.evaluation.protocol import Protocol
from fxquant.evaluation.provenance import Provenance
from fxquant.evaluation.results import Row, check_scheme
from fxquant.files.doors import parse_json, read_bytes
from fxquant.files.line_file import LineFile, LineKind, parse_lines

FORMAT: Final = 1


@dataclass(frozen=True)
class Result:
    """One cell of a sweep: what it was, and its figures or its error.

    ``fingerprint``: of everything that determines the figures. ``seed`` None: they do not depend on
    one. ``protocol``, ``figures`` and ``provenance`` are None where ``error`` is not. ``engine``:
    as Row has it.
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
    engine: str = ""

    def to_line(self) -> str:
        """One line of strict JSON: ``figures`` has Row's fields, numbers that are not finite are
        null, and ``format`` is the version of all this."""
        data = {"format": FORMAT, **asdict(self)}
        data["figures"] = None if self.figures is None else self.figures.to_json()
        return json.dumps(data, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_line(cls, line: str) -> Result:
        """The inverse of to_line. Raises ValueError for other text."""
        data = parse_json(line, strict=True, unique=True)
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
        if result.figures is not None:
            for name in ("scheme", "engine"):
                own, other = getattr(result, name), getattr(result.figures, name)
                if own != other:
                    raise ValueError(f"{name}: {own!r}, and {other!r} in figures")
        return result


KIND: Final = LineKind(
    parse=Result.from_line,
    plural="results",
    wrong="no result of this version",
    again="its cell done",
)


def read_journal(path: Path) -> list[Result]:
    """The results in a results.jsonl, the last line of each fingerprint, in order of appearance.

    A last line without its newline was being written when the run was killed: it does not count.
    Raises DataError for a file that cannot be read and for any other damage, with its line.
    """
    return parse_journal(read_bytes(path), path)


def parse_journal(content: bytes, path: Path) -> list[Result]:
    """As read_journal, of the content of the file at ``path``."""
    return list(_latest(parse_lines(content, path, KIND)).values())


def _latest(results: list[Result]) -> dict[str, Result]:
    return {result.fingerprint: result for result in results}


class Journal:
    """An open results.jsonl, locked against a second writer; ``results`` by fingerprint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Result] = {}
        self._file = LineFile(path, KIND)

    def __enter__(self) -> Journal:
        """Raises DataError where the file cannot be written, is damaged or in another's hands."""
        self.results = _latest(self._file.__enter__().lines)
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.__exit__(*raised)

    def append(self, result: Result) -> None:
        """Keep a result; on return it is on the disk. Where it cannot be kept (WriteError) it is
        in ``results`` only."""
        self.results[result.fingerprint] = result
        self._file.append(result.to_line())
