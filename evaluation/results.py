"""Rows, and the folder they are written to after each row."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxquant.errors import DataError, SchemeError
from fxquant.evaluation.decoding import decode
from fxquant.evaluation.provenance import Provenance
from fxquant.evaluation.statistics import WindowSums
from fxquant.files.doors import parse_json, printable, read_bytes, reason
from fxquant.files.locks import check_writable
from fxquant.files.whole_file import write_text
from fxquant.ir.calibration import Calibration, folded
from fxquant.ir.counted import counted
from fxquant.ir.coverage import share_words
from fxquant.ir.graph import Level
from fxquant.schemes.scheme import Scheme

RESULTS, TABLE = "results.json", "table.md"
# What null stands for in a row: JSON has no word for these.
_NOT_FINITE = {"perplexity": math.inf, "bits_per_weight": math.nan, "delta_loss": math.nan}


# Beyond any sum of losses in nats: its square is still a float64.
LARGEST = 1e100
_ROUNDING = 1e-6  # of sums that were printed and added again


def check_scheme(text: str, where: str) -> None:
    """Raise ValueError that names the place where ``text`` is no scheme."""
    try:
        Scheme.parse(text)
    except SchemeError as error:
        raise ValueError(f"{where}: {printable(text[:60])!r} is no scheme") from error


@dataclass(frozen=True)
class Row:
    """One scheme's result. Losses in nats a token; ``seconds`` of conversion and evaluation.

    ``delta_error``: standard error of delta_loss by paired differences over windows, None for the
    float model and for a single window. ``window_nll`` and ``window_tokens``: each window's summed
    nats (float64) and number of scored tokens, from which the others can be computed again.
    ``calibration``: what the graph was calibrated on, None where that is not known. ``overlap``:
    indices of evaluated windows that hold some of it, None where that could not be told.
    ``float_share``: of the blocks' weights, what stays in float, 0..1; None where nothing is codes.
    ``level``: of the graph that was run; "" where older results do not say. ``engine``: name and
    version of what ran the exported model, "" where the graph itself ran.
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
    calibration: Calibration = None
    overlap: tuple[int, ...] | None = ()
    float_share: float | None = None
    engine: str = ""
    level: str = ""

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
        row = decode(cls, data, where)
        row._check(f"{where}." if where else "")
        return row

    def _check(self, where: str) -> None:
        """Raise ValueError that names the field where figures cannot be what an evaluation gave."""
        check_scheme(self.scheme, f"{where}scheme")
        if len(self.window_nll) != len(self.window_tokens) or not self.window_nll:
            raise ValueError(
                f"{where}window_nll: {len(self.window_nll)} windows, {where}window_tokens: "
                f"{len(self.window_tokens)}"
            )
        if not all(1 <= count <= 2**31 for count in self.window_tokens):
            raise ValueError(f"{where}window_tokens: each must be from 1")
        for name in ("loss", "delta_loss", "delta_error", "share_clipped", "bits_per_weight"):
            value = getattr(self, name)
            if value is not None and abs(value) > LARGEST:
                raise ValueError(f"{where}{name}: {value} is no figure of an evaluation")
        if self.level and self.level not in list(Level):
            raise ValueError(f"{where}level: {printable(self.level[:60])!r} is no level")
        if self.float_share is not None and not 0 <= self.float_share <= 1:
            raise ValueError(f"{where}float_share: {self.float_share} is no share, 0 to 1")
        for value in self.window_nll:
            if value > LARGEST or value < -_ROUNDING:
                raise ValueError(f"{where}window_nll: {value} is no loss")
        self._check_means(where)

    def _check_means(self, where: str) -> None:
        """Loss and perplexity must be of the windows; beyond fp64 a perplexity is infinite."""
        mean = self.sums.loss
        found = {"loss": self.loss}
        if self.perplexity < math.inf:
            found["perplexity"] = math.log(self.perplexity) if self.perplexity > 0 else math.nan
        for name, value in found.items():
            if not abs(value - mean) <= _ROUNDING * max(1.0, abs(mean)):
                raise ValueError(f"{where}{name}: {getattr(self, name)} is not of its windows")


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
        data = parse_json(read_bytes(existing))
        finished, rows = bool(data["complete"]), len(data["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{existing} is damaged ({type(error).__name__}); move it away or give --overwrite"
        ) from error
    state = "a finished" if finished else "an unfinished"
    raise DataError(
        f"{existing} holds {state} run with {counted(rows, 'row')}; move it away to keep them "
        "or give --overwrite"
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
    lines = [provenance.line(), *row_notes(rows, provenance), f"`{provenance.command}`"]
    write_text(folder / TABLE, "\n\n".join([table, *lines]) + f"\n{note}")


def row_notes(rows: Sequence[Row], provenance: Provenance) -> list[str]:
    """What has to be said of single rows: windows that they were calibrated on, and calibrations
    that another command made, each once."""
    said = [
        f"{in_engine(row.scheme, row.engine)}: {_overlap_note(row)}"
        for row in rows
        if overlap_words(row)
    ]
    schemes: dict[str, list[str]] = {}
    for row in rows:
        for record in folded(row.calibration or ()) if not row.engine else ():
            if record.origin is None or record.origin.command != provenance.command:
                there = record.words() == provenance.calibration  # in the line above
                what = record.details() if there else f"on {record.line()}"
                schemes.setdefault(what, []).append(row.scheme)
    return said + [f"calibration of {', '.join(of)}: {what}" for what, of in schemes.items()]


def _overlap_note(row: Row) -> str:
    if row.overlap is None:
        return f"{overlap_words(row)}: nothing tells which of these windows it was calibrated on"
    listed = ", ".join(str(index + 1) for index in row.overlap)
    return f"{overlap_words(row)} (number {listed}), so that its loss is not of unseen text"


def in_engine(scheme: str, engine: str) -> str:
    """Which row it is: the scheme, and the engine of an exported model."""
    return f"{scheme} in {engine}" if engine else scheme


def overlap_words(row: Row) -> str:
    """How many of its windows the row was calibrated on; "" for none."""
    if row.overlap is None:
        return "overlap with the calibration not checked"
    windows = counted(len(row.window_nll), "evaluated window")
    return f"calibrated on {len(row.overlap)} of the {windows}" if row.overlap else ""


def float_words(row: Row) -> str:
    """How much of the blocks' weights a quantized row leaves in float; "" for nothing."""
    return share_words(row.float_share) if row.float_share else ""


def read_results(path: Path) -> tuple[list[Row], Provenance]:
    """Rows and provenance of a results.json. Raises DataError for anything else."""
    rows, provenance, _ = parse_results(read_bytes(path), path)
    return rows, provenance


def parse_results(content: bytes, path: Path) -> tuple[list[Row], Provenance, bool]:
    """Rows, provenance and whether all rows are there, of the content of the results.json at
    ``path``. Raises DataError that names the place of what is wrong."""
    try:
        data = parse_json(content, strict=True, unique=True)
        if not isinstance(data, dict) or not isinstance(data.get("rows"), list):
            raise ValueError("rows: expected a list")
        rows = [Row.from_json(row, f"rows[{n}]") for n, row in enumerate(data["rows"])]
        for n, row in enumerate(rows):
            if row.window_tokens != rows[0].window_tokens:
                raise ValueError(f"rows[{n}].window_tokens: not those of rows[0]")
        provenance = Provenance.from_json(data.get("provenance"), "provenance")
        return rows, provenance, bool(data.get("complete", True))
    except ValueError as error:
        raise DataError(
            f"{path} is no results.json of this version: {reason(error)}; write the file again "
            "with the command that made it, or move it out of the folder"
        ) from error
