"""What a results folder holds, parsed: files are told apart by their names."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fxquant.errors import DataError
from fxquant.evaluation.report.fields import Fields

RESULTS, SWEEP = "results.json", "results.jsonl"


@dataclass(frozen=True)
class Source:
    """A file that the report was made from, and what has to be said about it."""

    name: str
    bytes: int
    sha256: str
    remark: str = ""


@dataclass(frozen=True)
class Folder:
    """The parts that were found; a part that is not there is empty."""

    path: Path
    sources: tuple[Source, ...] = ()
    results: Fields | None = None
    sweep: tuple[Fields, ...] = ()
    explanations: tuple[Fields, ...] = ()
    inspections: tuple[Fields, ...] = ()


@dataclass
class _Reader:
    """Reads files and keeps what was read for the list of sources."""

    sources: list[Source] = field(default_factory=list)

    def object(self, path: Path) -> Fields:
        return Fields.of(path, "", _parse(path, "", self._text(path)))

    def lines(self, path: Path) -> tuple[Fields, ...]:
        """One object a line. A last line without its newline is still being written: left out."""
        text = self._text(path)
        whole, _, rest = text.rpartition("\n")
        if rest.strip():
            remark = "its last line is unfinished and was left out"
            self.sources[-1] = replace(self.sources[-1], remark=remark)
        numbered = ((f"line {n}", line) for n, line in enumerate(whole.split("\n"), 1))
        return tuple(
            Fields.of(path, where, _parse(path, where, line))
            for where, line in numbered
            if line.strip()
        )

    def _text(self, path: Path) -> str:
        try:
            raw = path.read_bytes()
            text = raw.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        self.sources.append(Source(path.name, len(raw), hashlib.sha256(raw).hexdigest()))
        return text


def read_folder(path: Path) -> Folder:
    """Parse every part of ``path``.

    Raises DataError, naming the file, where one cannot be read or is not valid JSON, and where the
    folder holds no part at all.
    """
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; give the one that --output named")
    reader = _Reader()
    results = reader.object(path / RESULTS) if (path / RESULTS).exists() else None
    sweep = reader.lines(path / SWEEP) if (path / SWEEP).exists() else ()
    explanations = tuple(reader.object(file) for file in sorted(path.glob("expla*.json")))
    inspections = tuple(reader.object(file) for file in sorted(path.glob("inspect*.json")))
    if not reader.sources:
        raise DataError(
            f"{path} holds no {RESULTS}, {SWEEP}, explanation*.json or inspect*.json; "
            f"fxquant evaluate --output {path} writes the first"
        )
    return Folder(path, tuple(reader.sources), results, sweep, explanations, inspections)


def _parse(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        at = f" {where}" if where else ""
        raise DataError(
            f"{path}:{at} is not valid JSON ({error}); write the file again with the command that "
            "made it, or move it out of the folder"
        ) from error
