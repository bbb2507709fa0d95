"""results.json and results.jsonl as ladders: the groups of ``fxquant table``, to be drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fxquant.analysis.inspection.folding import fold
from fxquant.evaluation.journal import Result
from fxquant.evaluation.provenance import Provenance
from fxquant.evaluation.report.folder import RESULTS, SWEEP, Folder
from fxquant.evaluation.report.tables import flatten, text_of
from fxquant.evaluation.result_notes import failures
from fxquant.evaluation.results import Row, in_engine
from fxquant.evaluation.sweep_tables import Group, Line, groups
from fxquant.ir.calibration import version_words
from fxquant.schemes.scheme import Scheme


@dataclass(frozen=True)
class Rung:
    """One scheme: the line that ``fxquant table`` prints of it, or why it failed."""

    scheme: str
    line: Line
    error: str | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        """One a seed."""
        return tuple(r.figures for r in self.line.results if r.figures is not None)

    @property
    def delta_loss(self) -> float | None:
        return None if self.line.difference is None else self.line.difference.delta

    @property
    def standard_error(self) -> float | None:
        """Of ``delta_loss``, the mean over seeds; None for the float model, whose Δ is 0."""
        if self.line.difference is None or self.scheme == str(Scheme()):
            return None
        return self.line.difference.error

    @property
    def seconds(self) -> float | None:
        """Mean of conversion and evaluation over seeds."""
        taken = [row.convert_seconds + row.evaluate_seconds for row in self.rows]
        return sum(taken) / len(taken) if taken else None


@dataclass(frozen=True)
class Ladder:
    """The rungs of one group, in the order in which they were run."""

    title: str
    origin: str
    rungs: tuple[Rung, ...]
    provenance: tuple[tuple[str, str], ...]
    complete: bool = True

    @property
    def seeds(self) -> int:
        return len({r.seed for rung in self.rungs for r in rung.line.results} - {None})

    @property
    def left_in_float(self) -> list[tuple[str, tuple[str, ...]]]:
        """(schemes, what they left in float and why), schemes alike together."""
        alike: dict[tuple[str, ...], list[str]] = {}
        for rung in self.rungs:
            for row in rung.rows[:1]:
                alike.setdefault(_folded(row.left_in_float), []).append(rung.scheme)
        return [(", ".join(schemes), lines) for lines, schemes in alike.items() if lines]


def ladders(folder: Folder) -> list[Ladder]:
    """One for each group of results.json, then of results.jsonl."""
    found = [replace(one, complete=folder.complete) for one in _ladders(folder.results, RESULTS)]
    return _distinct(found + _ladders(folder.sweep, SWEEP))


def _ladders(results: Sequence[Result], origin: str) -> list[Ladder]:
    """Failed cells, which have no setting, join the first ladder of their model and dataset."""
    failed: dict[tuple[str, str], list[Result]] = {}
    for result in failures(results):
        failed.setdefault((result.model, result.dataset), []).append(result)
    found = []
    for group in groups(results, ()):
        first = group.lines[0].results[0]
        found.append(_ladder(group, failed.pop((first.model, first.dataset), []), origin))
    for (model, dataset), cells in failed.items():
        facts = {"model": model, "dataset": dataset}
        rungs = tuple(_failed(cells, set()))
        found.append(Ladder(_title(facts), origin, rungs, tuple(facts.items())))
    return found


def _folded(lines: Iterable[str]) -> tuple[str, ...]:
    """``path: reason`` lines, those of one reason as one."""
    entries = ((path, reason) for path, _, reason in (line.partition(": ") for line in lines))
    return tuple(map(str, fold(entries)))


def _ladder(group: Group, failed: Iterable[Result], origin: str) -> Ladder:
    """Its provenance is what its results share, the group's calibration, and the seeds."""
    rungs = [Rung(in_engine(line.scheme, line.engine), line) for line in group.lines]
    results = [result for rung in rungs for result in rung.line.results]
    facts = [_facts(asdict(_joined(r.provenance, group))) for r in results if r.provenance]
    shared = {k: v for k, v in facts[0].items() if all(each.get(k) == v for each in facts)}
    seeds = sorted({result.seed for result in results if result.seed is not None})
    listed = {"seed": ", ".join(map(str, seeds))} if seeds else {}
    rungs += _failed(failed, {rung.scheme for rung in rungs})
    return Ladder(_title(shared), origin, tuple(rungs), tuple({**shared, **listed}.items()))


def _joined(made: Provenance, group: Group) -> Provenance:
    """A result may be shared by several groups, and keeps the calibration of the first run."""
    shown = group.provenance
    return replace(
        made, calibration=shown.calibration, calibration_windows=shown.calibration_windows
    )


def _failed(results: Iterable[Result], finished: set[str]) -> Iterable[Rung]:
    """A rung for each scheme that failed; for each of its seeds where others are finished."""
    seen = set()
    for result in results:
        name = in_engine(result.scheme, result.engine)
        if name in finished:
            name += f" (seed {result.seed})"
        if name not in seen:
            seen.add(name)
            yield Rung(name, Line(result.scheme), result.error)


def _distinct(found: list[Ladder]) -> list[Ladder]:
    """Titles that stand for one ladder each: with the file where two would be the same, and with a
    number where that is not enough."""
    for rename in (lambda ladder, _: f"{ladder.title} · {ladder.origin}", _numbered):
        titles = [ladder.title for ladder in found]
        found = [
            replace(ladder, title=rename(ladder, titles[:place].count(ladder.title)))
            if titles.count(ladder.title) > 1
            else ladder
            for place, ladder in enumerate(found)
        ]
    return found


def _numbered(ladder: Ladder, before: int) -> str:
    return f"{ladder.title} · {before + 1}"


def _facts(data: Mapping[str, Any]) -> dict[str, str]:
    """A provenance as text, its versions on one line."""
    flat = flatten({key: value for key, value in data.items() if key != "versions"})
    known = {key: value for key, value in flat.items() if value is not None and value != ""}
    facts = {key: text_of(value, "number") for key, value in known.items()}
    versions = version_words(data["versions"])
    return {**facts, "versions": versions}


def _title(facts: Mapping[str, str]) -> str:
    return " · ".join(facts[key] for key in ("model", "dataset"))
