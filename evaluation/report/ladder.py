"""results.json and results.jsonl as one ladder a model and dataset: Δloss by scheme and seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fxquant.evaluation.report.fields import Fields
from fxquant.evaluation.report.folder import Folder
from fxquant.evaluation.report.tables import flatten, text_of

# Cells of a sweep that differ in one of these are not on one ladder; seeds are.
SETTING = (
    "revision",
    "protocol",
    "windows",
    "length",
    "calibration_windows",
    "batch_size",
    "dtype",
    "device",
)


@dataclass(frozen=True)
class Run:
    """One scheme measured once. Losses in nats a token; ``error`` where it failed instead."""

    scheme: str
    seed: int | None
    loss: float | None
    delta_loss: float | None
    standard_error: float | None
    perplexity: float | None
    bits_per_weight: float | None
    share_clipped: float | None
    seconds: float | None
    left_in_float: tuple[str, ...]
    error: str | None


@dataclass(frozen=True)
class Rung:
    """One scheme over all its seeds.

    ``delta_loss`` is the mean over finished seeds, ``low`` and ``high`` their extremes,
    ``standard_error`` of one run over its windows: the root mean square over seeds.
    """

    scheme: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.error is None)

    @property
    def error(self) -> str | None:
        """The first failure, if no seed finished."""
        return None if self.finished else self.runs[0].error

    @property
    def delta_loss(self) -> float | None:
        return _mean(run.delta_loss for run in self.finished)

    @property
    def loss(self) -> float | None:
        return _mean(run.loss for run in self.finished)

    @property
    def perplexity(self) -> float | None:
        return _mean(run.perplexity for run in self.finished)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of Δloss over seeds; None with fewer than two."""
        values = [run.delta_loss for run in self.finished if run.delta_loss is not None]
        if len(values) < 2:
            return None
        mean = sum(values) / len(values)
        return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))

    @property
    def standard_error(self) -> float | None:
        mean = _mean(
            None if run.standard_error is None else run.standard_error**2 for run in self.finished
        )
        return None if mean is None else math.sqrt(mean)

    @property
    def bits_per_weight(self) -> float | None:
        return _mean(run.bits_per_weight for run in self.finished)

    @property
    def share_clipped(self) -> float | None:
        return _mean(run.share_clipped for run in self.finished)

    @property
    def seconds(self) -> float | None:
        return _mean(run.seconds for run in self.finished)


@dataclass(frozen=True)
class Ladder:
    """The rungs of one model on one dataset, in the order in which they were run."""

    title: str
    origin: str
    rungs: tuple[Rung, ...]
    provenance: tuple[tuple[str, str], ...]
    complete: bool = True

    @property
    def seeds(self) -> int:
        return len({run.seed for rung in self.rungs for run in rung.runs} - {None})

    @property
    def left_in_float(self) -> list[tuple[str, tuple[str, ...]]]:
        """(schemes, what they left in float and why), schemes alike together."""
        alike: dict[tuple[str, ...], list[str]] = {}
        for rung in self.rungs:
            for run in rung.finished[:1]:
                alike.setdefault(run.left_in_float, []).append(rung.scheme)
        return [(", ".join(schemes), lines) for lines, schemes in alike.items() if lines]


def ladders(folder: Folder) -> list[Ladder]:
    """One for results.json, then one for each model, dataset and setting of the sweep."""
    found = [] if folder.results is None else [_evaluation(folder.results)]
    return _distinct(found + _sweep(folder.sweep))


def _evaluation(results: Fields) -> Ladder:
    provenance = results.child("provenance")
    facts = _facts(provenance.data)
    seed = provenance.number_or_none("seed")
    runs = [_run(row, row, seed) for row in results.children("rows")]
    return Ladder(
        title=_title(facts),
        origin=results.file.name,
        rungs=_rungs(runs),
        provenance=tuple(facts.items()),
        complete=bool(results.data.get("complete", True)),
    )


def _sweep(lines: Iterable[Fields]) -> list[Ladder]:
    """A cell that was done again counts once; a failed one, which has no provenance, joins the
    first ladder of its model and dataset."""
    last = {line.data.get("fingerprint", line.where): line for line in lines}
    groups: dict[tuple[str, ...], list[Fields]] = {}
    failed: list[Fields] = []
    for line in last.values():
        if line.has("error"):
            failed.append(line)
        else:
            provenance = line.child("provenance").data
            setting = tuple(str(provenance.get(key)) for key in SETTING)
            groups.setdefault((line.text("model"), line.text("dataset"), *setting), []).append(line)
    for line in failed:
        cell = (line.text("model"), line.text("dataset"))
        key = next((key for key in groups if key[:2] == cell), cell)
        groups.setdefault(key, []).append(line)
    return [_group(members) for members in groups.values()]


def _group(members: list[Fields]) -> Ladder:
    """The provenance of a ladder is what its cells share, and the seeds that there are."""
    of_cells = [_facts(line.child("provenance").data) for line in members if line.has("provenance")]
    first = of_cells[0] if of_cells else _facts({})
    shared = {k: v for k, v in first.items() if all(facts.get(k) == v for facts in of_cells)}
    cell = {"model": members[0].text("model"), "dataset": members[0].text("dataset")}
    runs = [
        _run(line, line if line.has("error") else line.child("figures"), None) for line in members
    ]
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    listed = {"seed": ", ".join(map(str, seeds))} if seeds else {}
    return Ladder(
        title=_title(cell),
        origin=members[0].file.name,
        rungs=_rungs(runs),
        provenance=tuple({**cell, **shared, **listed}.items()),
    )


def _distinct(found: list[Ladder]) -> list[Ladder]:
    """Titles that stand for one ladder each: with file and setting where two would be the same."""
    titles = [ladder.title for ladder in found]
    return [
        replace(ladder, title=f"{ladder.title} · {ladder.origin}")
        if titles.count(ladder.title) > 1
        else ladder
        for ladder in found
    ]


def _rungs(runs: list[Run]) -> tuple[Rung, ...]:
    by_scheme: dict[str, list[Run]] = {}
    for run in runs:
        by_scheme.setdefault(run.scheme, []).append(run)
    return tuple(Rung(scheme, tuple(group)) for scheme, group in by_scheme.items())


def _run(cell: Fields, figures: Fields, seed: float | None) -> Run:
    """``cell`` says what was run, ``figures`` what came out; they may be one object."""
    error = cell.text_or_none("error")
    if error is None and figures.number_or_none("loss") is None:
        error = "its loss is not finite"
    seed = cell.number_or_none("seed") if cell.has("seed") else seed
    times = [figures.number_or_none(key) for key in ("convert_seconds", "evaluate_seconds")]
    taken = [value for value in times if value is not None]
    return Run(
        scheme=cell.text("scheme"),
        seed=None if seed is None else int(seed),
        loss=figures.number_or_none("loss"),
        delta_loss=figures.number_or_none("delta_loss"),
        standard_error=figures.number_or_none("delta_error"),
        perplexity=figures.number_or_none("perplexity"),
        bits_per_weight=figures.number_or_none("bits_per_weight"),
        share_clipped=figures.number_or_none("share_clipped"),
        seconds=sum(taken) if taken else None,
        left_in_float=tuple(str(value) for value in figures.values("left_in_float")),
        error=error,
    )


def _facts(data: Mapping[str, Any]) -> dict[str, str]:
    """A provenance as text, its versions on one line."""
    flat = flatten({key: value for key, value in data.items() if key != "versions"})
    facts = {key: text_of(value, "number") for key, value in flat.items() if value is not None}
    versions = data.get("versions")
    if isinstance(versions, dict):
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return facts


def _title(facts: Mapping[str, str]) -> str:
    return " · ".join(facts[key] for key in ("model", "dataset") if facts.get(key)) or "results"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
