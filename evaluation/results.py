"""Rows and provenance, and the folder they are written to after each row."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxquant.errors import DataError

RESULTS, TABLE = "results.json", "table.md"


@dataclass(frozen=True)
class Row:
    """One scheme's result. Losses in nats a token; ``seconds`` of conversion and evaluation."""

    scheme: str
    loss: float
    perplexity: float
    delta_loss: float
    bits_per_weight: float
    share_clipped: float | None
    convert_seconds: float
    evaluate_seconds: float
    left_in_float: tuple[str, ...]


@dataclass(frozen=True)
class Provenance:
    """What made the numbers: enough to make them again."""

    model: str
    revision: str
    dataset: str
    text_hash: str
    windows: int
    length: int
    calibration_windows: int
    batch_size: int
    dtype: str
    device: str
    seed: int
    threads: int
    versions: dict[str, str]
    command: str
    processes: int = 1

    def line(self) -> str:
        """One line for under a table."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        processes = f", {self.processes} processes" if self.processes > 1 else ""
        return (
            f"{self.model} ({self.revision[:23]}), {self.dataset} ({self.text_hash[:23]}), "
            f"{self.windows} windows of {self.length} tokens, {self.calibration_windows} to "
            f"calibrate, batch size {self.batch_size}, {self.dtype} on {self.device} "
            f"({self.threads} threads{processes}), seed {self.seed}; {versions}"
        )


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Make sure that results can be written to ``folder``.

    Raises DataError when it is not writable, or holds an unfinished run and not ``overwrite``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise DataError(f"cannot write to output folder {folder}: {error}") from error
    existing = folder / RESULTS
    if overwrite or not existing.exists():
        return
    try:
        data = json.loads(existing.read_text(encoding="utf-8"))
        finished, rows = bool(data["complete"]), len(data["rows"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{existing} is damaged ({type(error).__name__}); move it away or give --overwrite"
        ) from error
    if not finished:
        raise DataError(
            f"{existing} holds an unfinished run with {rows} row(s); move it away to keep them or "
            "give --overwrite"
        )


def write_results(
    folder: Path, rows: list[Row], provenance: Provenance, table: str, *, complete: bool
) -> None:
    """Write results.json and table.md, each in one step, so that neither is ever half there."""
    data: dict[str, Any] = {
        "complete": complete,
        "provenance": asdict(provenance),
        "rows": [asdict(row) for row in rows],
    }
    _replace(folder / RESULTS, json.dumps(data, indent=2) + "\n")
    note = "" if complete else "\nUnfinished: the run was interrupted.\n"
    _replace(folder / TABLE, f"{table}\n\n{provenance.line()}\n\n`{provenance.command}`\n{note}")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
