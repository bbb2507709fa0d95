"""inspect*.json, written from ``fxquant.inspect(gm).to_dict()``, as what the page shows of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fxquant.analysis.inspection.folding import fold
from fxquant.evaluation.decoding import decode
from fxquant.evaluation.report.fields import Fields, number_or_none
from fxquant.evaluation.report.tables import Table, flatten, label, table_of, text_of, unit
from fxquant.ir.calibration import Calibration, CalibrationRecord, calibration_words


@dataclass(frozen=True)
class PassRow:
    """One pass of the history; ``diff`` is the unified diff's lines, empty where none was kept."""

    name: str
    facts: tuple[tuple[str, str], ...]
    diff: tuple[str, ...]


@dataclass(frozen=True)
class Histogram:
    """A site's input: ``counts[i]`` elements lie between ``edges[i]`` and ``edges[i + 1]``.

    ``low`` and ``high`` are the calibrated range: what lies outside is clipped.
    """

    site: str
    edges: tuple[float, ...]
    counts: tuple[float, ...]
    low: float | None
    high: float | None
    share_clipped: float | None


@dataclass(frozen=True)
class Inspection:
    """One converted graph: header, history, sites, what was left in float, what passes noted."""

    title: str
    origin: str
    header: tuple[tuple[str, str], ...]
    history: tuple[PassRow, ...]
    sites: Table
    histograms: tuple[Histogram, ...]
    left_in_float: Table
    notes: Table


def read_inspection(file: Fields) -> Inspection:
    """Raises DataError, naming the file and the place, where the format is another one."""
    sites = list(file.children("sites"))
    records = [record for site in sites for record in site.children("records")]
    return Inspection(
        title=f"{file.text('model')} · {file.text('scheme')}",
        origin=file.file.name,
        header=tuple(_header(file)),
        history=tuple(_pass(row) for row in file.children("history")),
        sites=table_of(_site(site) for site in sites),
        histograms=tuple(_histogram(record) for record in records if record.values("histogram")),
        left_in_float=_folded(file, "left_in_float", "path", "reason"),
        notes=_folded(file, "notes", "site", "text"),
    )


def _folded(file: Fields, key: str, place: str, text: str) -> Table:
    """What is said at ``place`` of each entry; of sites alike in one row, with their number."""
    alike: dict[str, list[tuple[str, str]]] = {}
    for entry in file.children(key):
        origin = entry.text_or_none("origin") or ""
        alike.setdefault(origin, []).append((entry.text(place), entry.text(text)))
    return table_of(
        {
            **({"origin": origin} if origin else {}),
            place: remark.where,
            text: remark.text,
        }
        for origin, entries in alike.items()
        for remark in fold(entries)
    )


def _header(file: Fields) -> Iterator[tuple[str, str]]:
    for key in ("model", "scheme", "level"):
        yield key, file.text(key)
    for key in ("parameters", "bits_per_weight"):
        yield label(key), text_of(file.number_or_none(key), unit(key))
    for key in ("bytes_before", "bytes_after"):
        pairs = [pair for pair in file.values(key) if isinstance(pair, list) and len(pair) == 2]
        sizes = (f"{text_of(number_or_none(size), 'count')} {dtype}" for dtype, size in pairs)
        yield label(key), ", ".join(sizes)
    yield "calibrated on", calibration_words(_calibration(file))


def _calibration(file: Fields) -> Calibration:
    if not file.has("calibration"):
        return None
    try:
        records = [each.data for each in file.children("calibration")]
        return tuple(decode(CalibrationRecord, record) for record in records)
    except ValueError as error:
        raise file.wrong("calibration", f"records of calibration ({error})") from error


def _pass(row: Fields) -> PassRow:
    diff = row.data.get("diff")
    lines = diff.splitlines() if isinstance(diff, str) else map(str, row.values("diff"))
    shown = {k: v for k, v in row.data.items() if k not in ("name", "spelling", "diff")}
    facts = tuple(
        (label(key), text_of(value, "number"))
        for key, value in flatten(shown).items()
        if value is not None
    )
    name = row.text("name")
    return PassRow(row.text_or_none("spelling") or name, facts, tuple(lines))


def _site(site: Fields) -> dict[str, Any]:
    """A row of the table: the site, its weight's scales, and what quantize decided there."""
    kept = [record.data for record in site.children("records")]
    decided = dict(kept[0]) if kept else {}
    where = site.child("site").data if site.has("site") else {}
    decided.pop("histogram", None)
    row = {**decided, "path": site.text("path"), "spec": site.data.get("spec")}
    row |= {"shape": _shape(where.get("shape")), "weight scales": site.data.get("scales")}
    first = ("path", "shape", "spec", "estimator", "low", "high", "clipped", "weight_sqnr")
    return {key: row[key] for key in dict.fromkeys((*first, *row)) if key in row}


def _shape(shape: object) -> object:
    """``49152×576``: sizes, not numbers with separators."""
    return "×".join(map(str, shape)) if isinstance(shape, list) else shape


def _histogram(record: Fields) -> Histogram:
    """From equal bins between the extremes that calibration saw."""
    counts = tuple(_number(value) for value in record.values("histogram"))
    first, last = record.number("seen_low"), record.number("seen_high")
    if not all(map(math.isfinite, (first, last, *counts))) or not first < last:
        raise record.wrong("histogram", "finite counts between seen_low and seen_high")
    width = (last - first) / len(counts)
    return Histogram(
        site=record.text("path"),
        edges=(*(first + width * index for index in range(len(counts))), last),
        counts=counts,
        low=record.number_or_none("low"),
        high=record.number_or_none("high"),
        share_clipped=record.number_or_none("clipped"),
    )


def _number(value: object) -> float:
    number = number_or_none(value)
    return math.nan if number is None else number
