"""Rows, and the folder they are written to after each row."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fxquant.errors import DataError
from fxquant.evaluation.provenance import Provenance
from fxquant.evaluation.statistics import WindowSums

RESULTS, TABLE = "results.json", "table.md"


@dataclass(frozen=True)
class Row:
    """One scheme's result. Losses in nats a token; ``seconds`` of conversion and evaluation.

    ``delta_error``: standard error of delta_loss by paired differences over windows, None for the
    float model and for a single window. ``window_nll`` and ``window_tokens``: each window's summed
    nats (float64) and number of scored tokens, from which the others can be computed again.
    """

    scheme: str
    loss: float
    perplexity: float
    delta_loss: float
    delta_error: float | None
    bits_per_weight: float
    share_clipped: float | None
    convert_seconds: float
    evaluate_seconds: float
    left_in_float: tuple[str, ...]
    window_nll: tuple[float, ...]
    window_tokens: tuple[int, ...]

    @property
    def sums(self) -> WindowSums:
        return WindowSums(self.window_nll, self.window_tokens)

    def to_json(self) -> dict[str, Any]:
        """Fields; numbers that JSON cannot say (inf, nan) become null."""
        return {name: _finite(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        """The inverse of to_json. Raises KeyError or TypeError for other data."""
        lost = {"perplexity": math.inf, "bits_per_weight": math.nan}
        values = {f.name: data[f.name] for f in fields(cls)}
        for name, value in lost.items():
            values[name] = value if values[name] is None else values[name]
        for name in ("left_in_float", "window_nll", "window_tokens"):
            values[name] = tuple(values[name])
        return cls(**values)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Make sure that results can be written to ``folder``.

    Raises DataError when it is not writable, or holds a run (finished or not) and not
    ``overwrite``.
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
    state = "a finished" if finished else "an unfinished"
    raise DataError(
        f"{existing} holds {state} run with {rows} row(s); move it away to keep them or give "
        "--overwrite"
    )


def write_results(
    folder: Path, rows: list[Row], provenance: Provenance, table: str, *, complete: bool
) -> None:
    """Write results.json and table.md, each in one step, so that neither is ever half there."""
    data: dict[str, Any] = {
        "complete": complete,
        "provenance": asdict(provenance),
        "rows": [row.to_json() for row in rows],
    }
    _replace(folder / RESULTS, json.dumps(data, indent=2, allow_nan=False) + "\n")
    note = "" if complete else "\nUnfinished: still running, or interrupted.\n"
    _replace(folder / TABLE, f"{table}\n\n{provenance.line()}\n\n`{provenance.command}`\n{note}")


def read_results(path: Path) -> tuple[list[Row], Provenance]:
    """Rows and provenance of a results.json. Raises DataError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row.from_json(row) for row in data["rows"]]
        return rows, Provenance.from_json(data["provenance"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no results.json of this version: {type(error).__name__}: {error}"
        ) from error


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
