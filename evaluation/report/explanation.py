"""explain*.json, written from ``Explanation.to_dict()``, as what the page shows of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fxquant.evaluation.report.fields import Fields
from fxquant.evaluation.report.tables import (
    Table,
    flatten,
    label,
    records_of,
    table_of,
    text_of,
    unit,
)

CAUSES = ("weights", "clipping", "rounding", "scale")
# The order of a site's figures; what is not named here follows.
MEASURED = ("in_order", "rescue", "alone", "first_order")  # may be there for some sites only
EFFECTS = (*MEASURED, "path", "causes")
LISTS = {"worst_channels": "Channels", "worst_tokens": "Tokens"}
NOTES = {
    "counterfactuals": "What Δloss would be with another choice at a site, each measured.",
    "recovery": "Δloss that is left when the worst sites run in float.",
    "validation": "How far each figure can be trusted: against the exact effects that were run.",
    "costs": "What each method took, in forwards of the model and in seconds.",
}
# Parts of the file with a place of their own on the page; any other list or object is a table too.
PLACED = {"sites", "kinds", "blocks", "causes", "path", "notes", "windows", "provenance"}


@dataclass(frozen=True)
class Figure:
    """A number that sites have: one choice of the heatmap."""

    key: str
    label: str
    unit: str


@dataclass(frozen=True)
class Cell:
    """A site in the heatmap: the block it stands in (None: none), where it stands there, and its
    figures."""

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
    notes: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    causes: tuple[tuple[str, dict[str, float]], ...]
    figures: tuple[Figure, ...]
    cells: tuple[Cell, ...]
    recovery: tuple[tuple[float, float], ...]
    tables: tuple[NamedTable, ...]

    @property
    def cause_names(self) -> tuple[str, ...]:
        """The causes that any group has."""
        return tuple(c for c in CAUSES if any(c in parts for _, parts in self.causes))


def read_explanation(file: Fields) -> Explanation:
    """Raises DataError, naming the file and the place, where the format is another one."""
    sites = list(file.children("sites"))
    cells = tuple(_cell(site) for site in sites)
    keys = dict.fromkeys(key for cell in cells for key in cell.figures)
    keys = dict.fromkeys((*(key for key in MEASURED if key in keys), *keys))
    return Explanation(
        title=_title(file),
        origin=file.file.name,
        loss_float=file.number_or_none("loss_float"),
        loss_quantized=file.number_or_none("loss_quantized"),
        delta_loss=file.number("delta_loss"),
        notes=tuple(_notes(file)),
        facts=tuple(_facts(file)),
        causes=tuple(_causes(file)),
        figures=tuple(Figure(key, label(key), unit(key)) for key in keys),
        cells=cells,
        recovery=tuple(_recovery(file)),
        tables=tuple(named for named in _tables(file, sites) if named.table),
    )


def block_index(path: str) -> int | None:
    """The first number in a dotted path: the index in the list of blocks, where there is one."""
    found = re.search(r"(?:^|\.)([0-9]{1,9})(?:\.|$)", path)
    return int(found[1]) if found else None


def _cell(site: Fields) -> Cell:
    ordered, block = _ordered(site), site.text_or_none("block") or ""
    path = site.text("site")
    figures = flatten({k: v for k, v in ordered.items() if not isinstance(v, list)})
    return Cell(
        site=path,
        # Sites that share an input share a kind too: each has a place of its own in its block.
        kind=path.removeprefix(f"{block}.") if block else site.text("kind"),
        block=block_index(block),
        figures={key: value for key, value in figures.items() if isinstance(value, float)},
    )


def _ordered(site: Fields) -> dict[str, Any]:
    """What names the site, then its effects on the loss, then the rest; ``path`` with its sum."""
    first = ("site", "kind", "block", "cause", *EFFECTS)
    data = site.data
    keys = [*(key for key in first if key in data), *(key for key in data if key not in first)]
    ordered = {key: data[key] for key in keys}
    if isinstance(ordered.get("path"), dict):
        path = site.child("path")
        parts = [path.number(key) for key in path.data if path.has(key)]
        ordered["path"] = {"sum": sum(parts), **ordered["path"]}
    return ordered


def _title(file: Fields) -> str:
    known = [file.text_or_none(key) for key in ("model", "scheme", "sites_pattern")]
    return " · ".join(name for name in known if name) or file.file.stem


def _notes(file: Fields) -> Iterator[str]:
    """What the explanation has to say, and why ``path`` was refused where it was."""
    yield from (str(note) for note in file.values("notes"))
    if file.has("path") and file.child("path").has("refused"):
        yield f"path is not shown: {file.child('path').text('refused')}"


def _facts(file: Fields) -> Iterator[tuple[str, str]]:
    kept = ("provenance", "path", "windows")
    flat = flatten(
        {k: v for k, v in file.data.items() if k in kept or not isinstance(v, dict | list)}
    )
    for key, value in flat.items():
        if value is not None and key != "path.refused":
            yield label(key.removeprefix("provenance.")), text_of(value, unit(key))


def _causes(file: Fields) -> Iterator[tuple[str, dict[str, float]]]:
    if file.has("causes"):
        yield "whole model", _parts(file.child("causes"))
    for kind in file.children("kinds"):
        if kind.has("causes"):
            yield kind.text("name"), _parts(kind.child("causes"))


def _parts(causes: Fields) -> dict[str, float]:
    return {cause: causes.number(cause) for cause in CAUSES if causes.has(cause)}


def _recovery(file: Fields) -> Iterator[tuple[float, float]]:
    """(sites put right, Δloss that is left) for the curve."""
    for point in file.children("recovery"):
        left = point.number_or_none("delta_loss")
        if left is not None:
            yield point.number("fixed"), left


def _tables(file: Fields, sites: list[Fields]) -> Iterator[NamedTable]:
    records = [
        {**_ordered(site), "block": block_index(str(site.data.get("block")))} for site in sites
    ]
    yield NamedTable(
        "sites",
        "Sites",
        "Every quantized site with all its figures; Δ in nats a token. Clipped, rounded to zero: "
        "shares of the site's input on the measured windows, beyond the range by more than half a "
        "step, and not zero but rounded to it.",
        table_of(records, without=tuple(LISTS)),
    )
    for key in ("kinds", "blocks"):
        note = f"Sums over the sites of each of the {key}, and what was measured for them jointly."
        yield NamedTable(
            key, key.title(), note, table_of(group.data for group in file.children(key))
        )
    for key, title in LISTS.items():
        worst = [
            {"site": site.text("site"), **_visible(each.data)}
            for site in sites
            for each in site.children(key)
        ]
        note = f"The {title.lower()} with most of the error's energy, of the sites looked into."
        yield NamedTable(key, title, note, table_of(worst))
    for key in dict.fromkeys((*NOTES, *file.data)):
        value = file.data.get(key)
        if key not in PLACED and isinstance(value, dict | list):
            table = table_of(records_of(value, "method" if key == "costs" else "name"))
            yield NamedTable(key, label(key).capitalize(), NOTES.get(key, ""), table)


def _visible(token: Mapping[str, Any]) -> dict[str, Any]:
    """A token's text with its white space made visible; ``effect`` by its meaning."""
    text = token.get("text")
    shown = text.replace(" ", "␣").replace("\n", "⏎") if isinstance(text, str) else text
    return {key: shown if key == "text" else value for key, value in token.items()}
