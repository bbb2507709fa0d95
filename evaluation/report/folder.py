"""What a results folder holds, parsed: files are told apart by their names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fxquant.errors import DataError
from fxquant.evaluation.journal import Result, parse_journal
from fxquant.evaluation.report.fields import Fields
from fxquant.evaluation.results import in_engine, parse_results
from fxquant.files.doors import parse_json, read_bytes, reason

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
    """The parts that were found; a part that is not there is empty.

    ``results``: the rows of results.json as the cells of a sweep with one seed; ``complete``:
    whether that run is finished.
    """

    path: Path
    sources: tuple[Source, ...] = ()
    results: tuple[Result, ...] = ()
    complete: bool = True
    sweep: tuple[Result, ...] = ()
    explanations: tuple[Fields, ...] = ()
    inspections: tuple[Fields, ...] = ()


@dataclass
class _Reader:
    """Reads files and keeps what was read for the list of sources."""

    sources: list[Source] = field(default_factory=list)

    def object(self, path: Path) -> Fields:
        return Fields.of(path, "", _parse(path, self.content(path)))

    def evaluation(self, path: Path) -> tuple[tuple[Result, ...], bool]:
        """The rows of a results.json, and whether they are all."""
        rows, made, complete = parse_results(self.content(path), path)
        setting = (made.dataset, made.seed, made.protocol)
        cells = (
            Result(
                *(in_engine(r.scheme, r.engine), made.model, r.scheme, *setting, r, made),
                engine=r.engine,
            )
            for r in rows
        )
        return tuple(cells), complete

    def sweep(self, path: Path) -> tuple[Result, ...]:
        """A last line without its newline is still being written: left out."""
        content = self.content(path)
        if content.rpartition(b"\n")[2].strip():
            remark = "its last line is unfinished and was left out"
            self.sources[-1] = replace(self.sources[-1], remark=remark)
        return tuple(parse_journal(content, path))

    def content(self, path: Path) -> bytes:
        raw = read_bytes(path)
        self.sources.append(Source(path.name, len(raw), hashlib.sha256(raw).hexdigest()))
        return raw


def read_folder(path: Path) -> Folder:
    """Parse every part of ``path``.

    Raises DataError, naming the file, where one cannot be read or is not valid JSON, and where the
    folder holds no part at all.
    """
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; give the one that --output named")
    reader = _Reader()
    results, sweep = path / RESULTS, path / SWEEP
    rows, complete = reader.evaluation(results) if results.exists() else ((), True)
    cells = reader.sweep(sweep) if sweep.exists() else ()
    explanations = tuple(reader.object(file) for file in sorted(path.glob("expla*.json")))
    inspections = tuple(reader.object(file) for file in sorted(path.glob("inspect*.json")))
    if not reader.sources:
        raise DataError(
            f"{path} holds no {RESULTS}, {SWEEP}, explanation*.json or inspect*.json; "
            f"fxquant evaluate --output {path} writes the first"
        )
    return Folder(path, tuple(reader.sources), rows, complete, cells, explanations, inspections)


def _parse(path: Path, content: bytes) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        raise DataError(
            f"{path}: is not valid JSON ({reason(error)}); write the file again with the "
            "command that made it, or move it out of the folder"
        ) from error
