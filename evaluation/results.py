"""Rows, and the folder they are written to after each row."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxquant.errors import DataError
from fxquant.evaluation.decoding import decode
from fxquant.evaluation.provenance import Provenance
from fxquant.evaluation.statistics import WindowSums
from fxquant.locks import check_writable
from fxquant.whole_file import write_text

RESULTS, TABLE = "results.json", "table.md"
# What null stands for in a row: JSON has no word for these.
_NOT_FINITE = {"perplexity": math.inf, "bits_per_weight": math.nan, "delta_loss": math.nan}


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
    def from_json(cls, data: object, where: str = "") -> Row:
        """The inverse of to_json. Raises ValueError that names the field of other data."""
        if isinstance(data, dict):
            data = {**data, **{k: v for k, v in _NOT_FINITE.items() if data.get(k, 0) is None}}
        return decode(cls, data, where)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Make sure that results can be written to ``folder``.

    Raises DataError when it is not writable, or holds a run (finished or not) and not
    ``overwrite``.
    """
    check_writable(folder)
    existing = folder / RESULTS
    if overwrite or not existing.exists():
        return
    try:
        data = json.loads(existing.read_text(encoding="utf-8"))
        finished, rows = bool(data["complete"]), len(data["rows"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
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
    write_text(folder / RESULTS, json.dumps(data, indent=2, allow_nan=False) + "\n")
    note = "" if complete else "\nUnfinished: still running, or interrupted.\n"
    write_text(folder / TABLE, f"{table}\n\n{provenance.line()}\n\n`{provenance.command}`\n{note}")


def read_results(path: Path) -> tuple[list[Row], Provenance]:
    """Rows and provenance of a results.json. Raises DataError for anything else."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read results {path}: {error}") from error
    rows, provenance, _ = parse_results(content, path)
    return rows, provenance


def parse_results(content: bytes, path: Path) -> tuple[list[Row], Provenance, bool]:
    """Rows, provenance and whether all rows are there, of the content of the results.json at
    ``path``. Raises DataError that names the place of what is wrong."""
    try:
        data = json.loads(content.decode("utf-8"))
        if not isinstance(data, dict) or not isinstance(data.get("rows"), list):
            raise ValueError("rows: expected a list")
        rows = [Row.from_json(row, f"rows[{n}]") for n, row in enumerate(data["rows"])]
        provenance = Provenance.from_json(data.get("provenance"), "provenance")
        return rows, provenance, bool(data.get("complete", True))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is no results.json of this version: {error}; write the file again with the "
            "command that made it, or move it out of the folder"
        ) from error
