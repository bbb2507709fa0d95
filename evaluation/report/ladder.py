"""results.json and results.jsonl as one ladder a model and dataset: Δloss by scheme and seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fxquant.evaluation.report.fields import Fields
from fxquant.evaluation.report.folder import Folder
from fxquant.evaluation.report.tables import flatten, text_of

STANDARD_ERROR = ("standard_error", "delta_standard_error", "delta_loss_standard_error", "delta_se")
# What tells one ladder from another; whatever else differs between rows is listed with them.
GROUP = ("model", "dataset", "protocol", "dtype", "device", "windows", "length", "stride")


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

    @property
    def left_in_float(self) -> tuple[str, ...]:
        return self.finished[0].left_in_float if self.finished else ()


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
        return len({run.seed for rung in self.rungs for run in rung.runs})


def ladders(folder: Folder) -> list[Ladder]:
    """One for results.json, then one for each model and dataset of the sweep."""
    found = [] if folder.results is None else [_evaluation(folder.results)]
    groups: dict[tuple[str, ...], list[tuple[Run, dict[str, str]]]] = {}
    for line in folder.sweep:
        facts = _facts(line)
        key = tuple(facts.get(name, "") for name in GROUP)
        groups.setdefault(key, []).append((_run(line), facts))
    return _distinct(found + [_group(members) for members in groups.values()])


def _distinct(found: list[Ladder]) -> list[Ladder]:
    """Titles that stand for one ladder each: with the file's name where two would be the same."""
    titles = [ladder.title for ladder in found]
    return [
        replace(ladder, title=f"{ladder.title} · {ladder.origin}")
        if titles.count(ladder.title) > 1
        else ladder
        for ladder in found
    ]


def _evaluation(results: Fields) -> Ladder:
    facts = _text_facts(results.child("provenance").data)
    seed = results.child("provenance").number_or_none("seed")
    runs = [_run(row, seed) for row in results.children("rows")]
    return Ladder(
        title=_title(facts),
        origin=results.file.name,
        rungs=_rungs(runs),
        provenance=tuple(facts.items()),
        complete=bool(results.data.get("complete", True)),
    )


def _group(members: list[tuple[Run, dict[str, str]]]) -> Ladder:
    """``members`` agree in GROUP; what else they all share is the ladder's provenance."""
    facts = members[0][1]
    shared = {k: v for k, v in facts.items() if all(f.get(k) == v for _, f in members)}
    varying = {
        key: ", ".join(dict.fromkeys(f[key] for _, f in members if key in f))
        for key in ("seed",)
        if key not in shared and any(key in f for _, f in members)
    }
    return Ladder(
        title=_title(facts),
        origin="results.jsonl",
        rungs=_rungs([run for run, _ in members]),
        provenance=tuple({**shared, **varying}.items()),
    )


def _rungs(runs: list[Run]) -> tuple[Rung, ...]:
    by_scheme: dict[str, list[Run]] = {}
    for run in runs:
        by_scheme.setdefault(run.scheme, []).append(run)
    return tuple(Rung(scheme, tuple(group)) for scheme, group in by_scheme.items())


def _run(row: Fields, seed: float | None = None) -> Run:
    error = row.text_or_none("error")
    seed = row.number_or_none("seed") if row.has("seed") else seed
    times = [row.number_or_none(key) for key in ("convert_seconds", "evaluate_seconds", "seconds")]
    taken = [value for value in times if value is not None]
    return Run(
        scheme=row.text("scheme"),
        seed=None if seed is None else int(seed),
        loss=row.number("loss") if error is None else None,
        delta_loss=row.number_or_none("delta_loss") if error is None else None,
        standard_error=row.number_or_none(*STANDARD_ERROR),
        perplexity=row.number_or_none("perplexity"),
        bits_per_weight=row.number_or_none("bits_per_weight"),
        share_clipped=row.number_or_none("share_clipped"),
        seconds=sum(taken) if taken else None,
        left_in_float=tuple(str(value) for value in row.values("left_in_float")),
        error=error,
    )


def _facts(line: Fields) -> dict[str, str]:
    """What made a sweep's row: its provenance object and the scalars beside it."""
    provenance = line.child("provenance").data if line.has("provenance") else {}
    beside = {k: line.data[k] for k in (*GROUP, "seed", "revision") if k in line.data}
    return _text_facts({**beside, **provenance})


def _text_facts(data: Mapping[str, Any]) -> dict[str, str]:
    flat = flatten({k: v for k, v in data.items() if k != "versions"})
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
