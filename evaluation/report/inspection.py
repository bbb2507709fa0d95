"""inspect*.json, written from ``fxquant.inspect(gm).to_dict()``, as what the page shows of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fxquant.evaluation.report.fields import Fields, number_or_none
from fxquant.evaluation.report.tables import Table, flatten, label, table_of, text_of


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
    """One converted graph: header, history, sites, and what was left in float."""

    title: str
    origin: str
    header: tuple[tuple[str, str], ...]
    history: tuple[PassRow, ...]
    sites: Table
    histograms: tuple[Histogram, ...]
    left_in_float: Table


def read_inspection(file: Fields) -> Inspection:
    """Raises DataError, naming the file and the place, where the format is another one."""
    header = file.child("header") if file.has("header") else Fields(file.file, "", {})
    sites = list(file.children("sites"))
    known = [header.text_or_none(key) for key in ("model", "scheme")]
    return Inspection(
        title=" · ".join(name for name in known if name) or file.file.stem,
        origin=file.file.name,
        header=tuple(_pairs(header.data)),
        history=tuple(_pass(row) for row in file.children("history")),
        sites=table_of(
            (site.data for site in sites), without=("histogram", "weight_histogram", "nodes")
        ),
        histograms=tuple(_histogram(site) for site in sites if site.has("histogram")),
        left_in_float=table_of(row.data for row in file.children("left_in_float")),
    )


def _pairs(data: Any) -> Iterator[tuple[str, str]]:
    for key, value in flatten(data).items():
        if value is not None:
            yield label(key), text_of(value, "number")


def _pass(row: Fields) -> PassRow:
    diff = row.data.get("diff") or []
    lines = diff.splitlines() if isinstance(diff, str) else [str(line) for line in diff]
    shown = {k: v for k, v in row.data.items() if k not in ("name", "diff")}
    return PassRow(row.text("name"), tuple(_pairs(shown)), tuple(lines))


def _histogram(site: Fields) -> Histogram:
    histogram = site.child("histogram")
    edges = tuple(_number(value) for value in histogram.values("edges"))
    counts = tuple(_number(value) for value in histogram.values("counts"))
    if len(edges) != len(counts) + 1 or not all(map(math.isfinite, (*edges, *counts))):
        raise histogram.wrong("edges", f"{len(counts) + 1} finite edges around the counts")
    low, high = _range(site)
    return Histogram(
        site=site.text("site") if site.has("site") else site.text("path"),
        edges=edges,
        counts=counts,
        low=low,
        high=high,
        share_clipped=site.number_or_none("share_clipped"),
    )


def _number(value: object) -> float:
    number = number_or_none(value)
    return math.nan if number is None else number


def _range(site: Fields) -> tuple[float | None, float | None]:
    """[low, high] at ``range``, or {low, high}."""
    value = site.data.get("range")
    if isinstance(value, dict):
        value = [value.get("low"), value.get("high")]
    if isinstance(value, list) and len(value) == 2:
        return number_or_none(value[0]), number_or_none(value[1])
    return None, None
