"""explain*.json, written from ``Explanation.to_dict()``, as what the page shows of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fxquant.evaluation.report.fields import Fields, number_or_none
from fxquant.evaluation.report.tables import Table, flatten, label, records_of, table_of, unit

LISTS = ("worst_channels", "worst_tokens")
CAUSES = ("weights", "clipping", "rounding")
# Parts of the file with a place of their own on the page; other objects and lists become tables.
KNOWN = {"sites", "kinds", "blocks", "causes", "recovery", *LISTS}
BEFORE = ("validation", "counterfactuals")


@dataclass(frozen=True)
class Figure:
    """A number that sites have: one choice of the heatmap."""

    key: str
    label: str
    unit: str


@dataclass(frozen=True)
class Cell:
    """A site in the heatmap: the block it stands in (None: none), its kind and its figures."""

    site: str
    kind: str
    block: int | None
    figures: dict[str, float | None]


@dataclass(frozen=True)
class NamedTable:
    """A table with its heading and one sentence on what it holds."""

    key: str
    title: str
    note: str
    table: Table


@dataclass(frozen=True)
class Explanation:
    """One scheme's Δloss taken apart. ``causes`` by group: the whole model, then each kind."""

    title: str
    origin: str
    loss_float: float | None
    loss_quantized: float | None
    delta_loss: float
    facts: tuple[tuple[str, str], ...]
    causes: tuple[tuple[str, dict[str, float]], ...]
    figures: tuple[Figure, ...]
    cells: tuple[Cell, ...]
    recovery: tuple[tuple[float, float], ...]
    tables: tuple[NamedTable, ...]


def read_explanation(file: Fields) -> Explanation:
    """Raises DataError, naming the file and the place, where the format is another one."""
    sites = list(file.children("sites"))
    cells = tuple(_cell(site) for site in sites)
    keys = dict.fromkeys(key for cell in cells for key in cell.figures)
    return Explanation(
        title=_title(file),
        origin=file.file.name,
        loss_float=file.number_or_none("loss_float"),
        loss_quantized=file.number_or_none("loss_quantized"),
        delta_loss=file.number("delta_loss"),
        facts=tuple(_facts(file)),
        causes=tuple(_causes(file)),
        figures=tuple(Figure(key, label(key), unit(key)) for key in keys),
        cells=cells,
        recovery=tuple(_recovery(file)),
        tables=tuple(t for t in _tables(file, sites) if t.table),
    )


def block_of(path: str) -> int | None:
    """The first number in a dotted path: the index in the list of blocks, where there is one."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found[1]) if found else None


def _cell(site: Fields) -> Cell:
    path = site.text("site")
    block = site.data.get("block")
    figures = flatten(_without_lists(site.data))
    return Cell(
        site=path,
        kind=site.text_or_none("kind") or path.rpartition(".")[2],
        block=block if isinstance(block, int) else block_of(path if block is None else str(block)),
        figures={k: v for k, v in figures.items() if isinstance(v, float) and k != "block"},
    )


def _without_lists(data: Any) -> dict[str, Any]:
    return {key: value for key, value in data.items() if not isinstance(value, list)}


def _title(file: Fields) -> str:
    facts = {**file.data, **(file.data.get("provenance") or {})}
    known = [str(facts[key]) for key in ("model", "scheme") if facts.get(key)]
    return " · ".join(known) or file.file.stem


def _facts(file: Fields) -> Iterator[tuple[str, str]]:
    flat = flatten(file.child("provenance").data) if file.has("provenance") else {}
    flat |= flatten({k: v for k, v in file.data.items() if not isinstance(v, dict | list)})
    for key, value in flat.items():
        if value is not None and key not in ("loss_float", "loss_quantized", "delta_loss"):
            yield label(key), f"{value:g}" if isinstance(value, float) else value


def _causes(file: Fields) -> Iterator[tuple[str, dict[str, float]]]:
    if file.has("causes"):
        yield "whole model", {cause: file.child("causes").number(cause) for cause in CAUSES}
    for record in records_of(file.data.get("kinds"), "kind"):
        parts = record.get("causes")
        if isinstance(parts, dict):
            values = {cause: number_or_none(parts.get(cause)) for cause in CAUSES}
            yield str(record.get("kind")), {k: v for k, v in values.items() if v is not None}


def _recovery(file: Fields) -> Iterator[tuple[float, float]]:
    """(sites put right, Δloss that is left) for the curve."""
    for point in file.children("recovery"):
        count = point.number_or_none("sites", "count", "fixed", "k")
        left = point.number_or_none("delta_loss", "delta", "left")
        if count is not None and left is not None:
            yield count, left


def _tables(file: Fields, sites: list[Fields]) -> Iterator[NamedTable]:
    records = [_without_lists(site.data) for site in sites]
    yield NamedTable(
        "sites", "Sites", "Every quantized site, with all its figures.", table_of(records)
    )
    for key, name in (("kinds", "kind"), ("blocks", "block")):
        table = table_of(records_of(file.data.get(key), name))
        yield NamedTable(key, key.title(), f"Sums over the sites of a {name}.", table)
    for key in LISTS:
        collected = [
            {"site": site.text("site"), **record}
            for site in sites
            for record in records_of(site.data.get(key), "channel")
        ] + records_of(file.data.get(key), "site")
        title = key.removeprefix("worst_").title()
        note = f"The {title.lower()} that carry most of the error at the worst sites."
        yield NamedTable(key, title, note, table_of(collected))
    for key in dict.fromkeys((*BEFORE, "recovery", *file.data)):
        value = file.data.get(key)
        if (
            key not in KNOWN - {"recovery"}
            and key != "provenance"
            and isinstance(value, dict | list)
        ):
            yield NamedTable(
                key,
                label(key).capitalize(),
                NOTES.get(key, ""),
                table_of(records_of(value, "name")),
            )


NOTES = {
    "counterfactuals": "What Δloss would be with another choice at a site, each measured.",
    "validation": "How far each estimate can be trusted, against the exact methods that were run.",
    "recovery": "Δloss that is left when the worst sites are put back in float.",
}
