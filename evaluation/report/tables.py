"""Plain records as tables: which columns there are, what unit each has, how a value is printed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fxquant.evaluation.report.fields import number_or_none

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
Unit = Literal[
    "text", "nats", "loss", "perplexity", "share", "decibel", "bits", "seconds", "count", "number"
]

# What the formats' keys mean; a key that is not here is shown under its own name.
LABELS: dict[str, str] = {
    "alone": "alone Δ",
    "rescue": "rescue Δ",
    "in_order": "in order Δ",
    "path": "path Δ",
    "loss_float": "float loss",
    "loss_quantized": "quantized loss",
    "delta_loss": "Δloss",
    "ppl": "perplexity",
    "sqnr": "SQNR",
    "weight_sqnr": "weight SQNR",
    "sqnr_db": "SQNR",
    "bits_per_weight": "bits/weight",
    "effect": "path Δ",
    "clipped": "outside the range",
    "share_clipped": "clipped",
    "share_flushed": "rounded to zero",
}
_NATS = {"alone", "rescue", "in_order", "first_order", "path", "causes", "recovered", "effect"}
# Containers whose name says nothing that the key inside does not say.
_PLAIN = {"sums", "effects", "measured"}
_LOSS = {"loss", "loss_float", "loss_quantized"}


@dataclass(frozen=True)
class Column:
    """A key of the records, the heading it has and the unit of its numbers."""

    key: str
    label: str
    unit: Unit

    @property
    def is_number(self) -> bool:
        return self.unit != "text"


@dataclass(frozen=True)
class Table:
    """Columns and, for each row, one value a column: text, float or None."""

    columns: tuple[Column, ...] = ()
    rows: tuple[tuple[str | float | None, ...], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows)


def label(key: str) -> str:
    """The heading of ``key``; ``sums.in_order`` is "in order Δ"."""
    head, _, rest = key.partition(".")
    if key in LABELS:
        return LABELS[key]
    if not rest:
        return key.replace("_", " ")
    return label(rest) if head in _PLAIN else f"{label(head)}, {label(rest)}"


def unit(key: str) -> Unit:
    """The unit of the numbers at ``key``, known from its name."""
    head, last = key.partition(".")[0], key.rpartition(".")[2]
    if key == "path.points":
        return "count"
    if last in _LOSS:
        return "loss"
    last = last.partition(":")[0]  # "rescue:kinds", measured jointly
    if head in _NATS or last in _NATS or last.startswith("delta"):
        return "nats"
    if last.startswith(("share", "fraction")) or last == "clipped":
        return "share"
    if last.endswith("db") or "sqnr" in last:
        return "decibel"
    if last in ("perplexity", "ppl"):
        return "perplexity"
    if last.endswith("seconds") and not last.endswith("milliseconds"):
        return "seconds"
    if last.startswith("bits"):
        return "bits"
    return "number"


def flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, str | float | None]:
    """Scalars by dotted key; a list stays one value, as text."""
    flat: dict[str, str | float | None] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _scalar(value)
    return flat


def table_of(records: Iterable[Mapping[str, Any]], without: Sequence[str] = ()) -> Table:
    """One row a record; a column for each key that ever has a value, as they first stand."""
    flat = [flatten({k: v for k, v in r.items() if k not in without}) for r in records]
    valued = {k for record in flat for k, value in record.items() if value is not None}
    keys = dict.fromkeys(k for record in flat for k in record if k in valued)
    columns = tuple(_column(key, [record.get(key) for record in flat]) for key in keys)
    rows = tuple(tuple(record.get(column.key) for column in columns) for record in flat)
    return Table(columns, rows)


def records_of(value: Any, name: str) -> list[dict[str, Any]]:
    """Whatever shape a summary has, as records: a list of objects, or an object keyed by ``name``.

    ``{"fc1": {"alone": 1.0}}`` becomes ``[{name: "fc1", "alone": 1.0}]``, ``{"fc1": 1.0}`` becomes
    ``[{name: "fc1", "value": 1.0}]``.
    """
    if isinstance(value, list):
        return [item if isinstance(item, dict) else {"value": item} for item in value]
    if isinstance(value, dict):
        return [
            {name: key, **(item if isinstance(item, dict) else {"value": item})}
            for key, item in value.items()
        ]
    return [] if value is None else [{"value": value}]


def text_of(value: str | float | None, unit: Unit) -> str:
    """``value`` as the page prints it: − for minus, a fixed number of decimals a unit."""
    if value is None:
        return DASH
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else f"{MINUS}∞")
    return _finite(value, unit).replace("-", MINUS)


def _finite(value: float, unit: Unit) -> str:
    if unit == "nats":
        return (
            f"{value:+.4f}"
            if abs(value) >= 5e-5 or value == 0
            else f"{value:+.1e}".replace("e-0", "e-")
        )
    if unit == "loss":
        return f"{value:.4f}"
    if unit == "share":
        return f"{value:.4%}" if abs(value) < 0.01 else f"{value:.2%}"
    if unit == "decibel":
        return f"{value:.1f} dB"
    if unit == "seconds":
        return f"{value:,.1f}"
    if unit in ("bits", "perplexity"):
        return f"{value:.2f}" if abs(value) < 1e6 else f"{value:.2e}"
    if unit == "count" or (value.is_integer() and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _column(key: str, values: list[str | float | None]) -> Column:
    numbers = all(value is None or isinstance(value, float) for value in values)
    if numbers:
        return Column(key, label(key), unit(key))
    return Column(key, key.rpartition(".")[2].replace("_", " "), "text")


def _scalar(value: Any) -> str | float | None:
    if value is None or isinstance(value, bool):
        return None if value is None else ("yes" if value else "no")
    number = number_or_none(value)
    if number is not None:
        return number
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(not isinstance(item, dict | list) for item in value):
        return ", ".join(text_of(_scalar(item), "number") for item in value)
    return json.dumps(value, ensure_ascii=False)
