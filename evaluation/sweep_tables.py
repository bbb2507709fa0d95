"""Tables of a sweep's results: grouped, averaged over seeds, published figures beside ours."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

from tabulate import tabulate, tabulate_formats

from fxquant.errors import DataError
from fxquant.evaluation.journal import Result
from fxquant.evaluation.provenance import Provenance
from fxquant.evaluation.published import ALL, LENGTH, Published
from fxquant.evaluation.result_notes import failed_lines, failures
from fxquant.evaluation.results import Row, overlap_words
from fxquant.evaluation.statistics import Difference, mean_sums, paired_difference, spread
from fxquant.ir.calibration import NOTHING, UNKNOWN, version_words
from fxquant.schemes.scheme import Scheme, brief

FORMATS: Final = ("csv", *tabulate_formats)
_PER_SEED: Final = ("seed", "command", "threads", "windows_hash", "engine")
_OF_CALIBRATION: Final = ("calibration", "calibration_windows")


@dataclass(frozen=True)
class Line:
    """One scheme's figures in a group: over its seeds, beside what was published; ``engine``: what
    ran its export, "" for the graph itself.

    ``loss``, ``difference`` None: published only. ``spread``: standard deviation of the loss over
    seeds, None for fewer than two. ``off``: ours minus published, in the published unit.
    ``results``: what the figures are made from.
    """

    scheme: str
    engine: str = ""
    seeds: int = 0
    loss: float | None = None
    difference: Difference | None = None
    spread: float | None = None
    bits_per_weight: float | None = None
    share_clipped: float | None = None
    published: Published | None = None
    results: tuple[Result, ...] = ()

    @property
    def perplexity(self) -> float | None:
        if self.loss is None:
            return None
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def overlap(self) -> str:
        """What has to be said where a result was, or may have been, calibrated on its windows."""
        rows = [each.figures for each in self.results if each.figures is not None]
        return next(filter(None, map(overlap_words, rows)), "")

    @property
    def off(self) -> float | None:
        published = self.published
        if published is None or self.loss is None:
            return None
        if published.dataset is not None and published.perplexity is not None:
            return (self.perplexity or math.nan) - published.perplexity
        if published.delta_loss is None or self.difference is None:
            return None
        return self.difference.delta - published.delta_loss


@dataclass(frozen=True)
class Group:
    """Lines that compare with one another: one model on the same windows, under one setting."""

    provenance: Provenance
    lines: tuple[Line, ...]


def groups(
    results: Iterable[Result], published: Sequence[Published] = ALL, *, unmatched: bool = False
) -> list[Group]:
    """Successful results by model, windows and setting, in order of appearance.

    Where calibrations differ there is a group for each; results that depend on none are in all of
    them. ``unmatched``: also the published figures of the group's model and text
    that none of ours is.
    """
    settings: dict[str, list[Result]] = {}
    for result in results:
        if result.figures is not None and result.provenance is not None:
            settings.setdefault(_setting(result.provenance), []).append(result)
    return [
        _group(members, published, unmatched)
        for alike in settings.values()
        for members in _by_calibration(alike)
    ]


def _setting(made: Provenance) -> str:
    apart = (*_PER_SEED, *_OF_CALIBRATION)
    # Sweeps that do not say their level knew no other one.
    said = {**asdict(made), "level": made.level or "integer"}
    return repr({k: v for k, v in said.items() if k not in apart})


def _by_calibration(results: list[Result]) -> list[list[Result]]:
    """The results of each calibration, those that depend on none in every list."""
    kinds = dict.fromkeys(_calibration(each) for each in results if _reads(each))
    if not kinds:
        return [results]
    return [[r for r in results if not _reads(r) or _calibration(r) == kind] for kind in kinds]


def _reads(result: Result) -> bool:
    """Whether the result's graph was, or may have been, calibrated: on windows that a seed drew, or
    on what is not known."""
    made, row = result.provenance, result.figures
    unknown = made is not None and made.calibration == UNKNOWN
    return result.seed is not None or unknown or (row is not None and bool(row.calibration))


def _calibration(result: Result) -> tuple[object, ...]:
    return tuple(getattr(result.provenance, name) for name in _OF_CALIBRATION)


def _shared_provenance(members: list[Result]) -> Provenance:
    """The first one's, with the calibration of those that have one."""
    made = [each.provenance for each in members if each.provenance is not None]
    calibrated = (r.provenance for r in members if _reads(r) and r.provenance is not None)
    source = next(calibrated, None)
    if source is None:
        return replace(made[0], calibration=NOTHING, calibration_windows=0)
    calibration = {name: getattr(source, name) for name in _OF_CALIBRATION}
    return replace(made[0], **calibration)


def _group(members: list[Result], published: Sequence[Published], unmatched: bool) -> Group:
    provenance = _shared_provenance(members)
    known = [figure for figure in published if _comparable(figure, provenance)]
    by_scheme: dict[tuple[str, str], list[Result]] = {}
    for result in members:
        by_scheme.setdefault((result.scheme, result.engine), []).append(result)
    float_model = by_scheme.get((str(Scheme()), ""))
    reference = None if float_model is None else float_model[0].figures
    lines = [_line(results, reference, known) for results in by_scheme.values()]
    if unmatched:
        shown = [line.published for line in lines]
        lines += [Line("-", published=figure) for figure in known if figure not in shown]
    return Group(provenance, tuple(lines))


def _comparable(figure: Published, provenance: Provenance) -> bool:
    """Same shape of model; the same protocol in full, or a difference on an unnamed text."""
    if figure.architecture != provenance.architecture:
        return False
    if figure.named not in provenance.model.lower():
        return False
    if figure.dataset is None:
        return True
    protocol = provenance.protocol
    whole = protocol.complete and protocol.length == protocol.stride == LENGTH
    return whole and figure.dataset == protocol.dataset


def _line(results: list[Result], reference: Row | None, known: list[Published]) -> Line:
    # Without a seed there is one figure, however often it was computed.
    results = [result for result in results if result.seed is not None] or results[-1:]
    rows = [result.figures for result in results if result.figures is not None]
    first, sums = rows[0], mean_sums([row.sums for row in rows])
    scheme = Scheme.parse(first.scheme)
    known = [] if first.engine else known  # published figures are of a simulation too
    matching = [f for f in known if f.scheme is not None and Scheme.parse(f.scheme) == scheme]
    # A perplexity under the same protocol says more than a difference on another text.
    matching.sort(key=lambda figure: figure.dataset is None)
    clipped = [row.share_clipped for row in rows if row.share_clipped is not None]
    return Line(
        scheme=first.scheme,
        engine=first.engine,
        seeds=len(rows),
        loss=sums.loss,
        difference=None if reference is None else paired_difference(sums, reference.sums),
        spread=spread([row.loss for row in rows]),
        bits_per_weight=first.bits_per_weight,
        share_clipped=sum(clipped) / len(clipped) if clipped else None,
        published=matching[0] if matching else None,
        results=tuple(results),
    )


def check_format(style: str) -> None:
    """Raise DataError for a format that there is not."""
    if style not in FORMATS:
        raise DataError(f"unknown format {style!r}: known are {', '.join(FORMATS)}")


def format_results(
    results: Iterable[Result],
    style: str = "github",
    published: Sequence[Published] = ALL,
    *,
    unmatched: bool = False,
) -> str:
    """All groups as text, each under what made it; failures at the end. Raises DataError."""
    check_format(style)
    listed = list(results)
    found = groups(listed, published, unmatched=unmatched)
    if style == "csv":
        return _csv(found)
    parts = [part for group in found for part in _parts(group, style)]
    failed = failed_lines(failures(listed))
    return "\n\n".join([*parts, *(["\n".join(failed)] if failed else [])])


def _parts(group: Group, style: str) -> list[str]:
    notes = "\n".join(calibration_notes(group))
    return [_title(group.provenance), format_group(group, style), *filter(None, [notes])]


def calibration_notes(group: Group) -> list[str]:
    """A line for each calibration that published figures of the group have and ours have not."""
    ours = group.provenance.calibration
    alike: dict[tuple[str, str], list[str]] = {}
    for line in group.lines:
        figure = line.published
        if figure is None or figure.calibration is None or line.loss is None:
            continue
        if not figure.calibration.is_that_of(ours):
            place = (figure.source, figure.calibration.words)
            alike.setdefault(place, []).append(figure.method)
    return [
        f"{', '.join(methods)} ({source}): calibrated on {words}, ours on {ours}"
        for (source, words), methods in alike.items()
    ]


def format_group(group: Group, style: str = "github") -> str:
    """One group's table; columns that no line fills are left out."""
    cells = [_cells(line) for line in group.lines]
    keep = [
        name
        for index, name in enumerate(cells[0])
        if index < 5 or any(row[name] not in ("-", "1", "0") for row in cells)
    ]
    body = [[row[name] for name in keep] for row in cells]
    text = {"scheme", "published as", "source"}
    align = ["left" if name in text else "right" for name in keep]
    return tabulate(body, keep, tablefmt=style, disable_numparse=True, colalign=align)


def _cells(line: Line) -> dict[str, str]:
    figure = line.published
    said = (f"in {line.engine}" if line.engine else "", line.overlap)
    return {
        "scheme": " ".join([brief(line.scheme), *(f"[{each}]" for each in said if each)]),
        "loss": _number(line.loss, ".4f"),
        "ppl": _perplexity(line.perplexity),
        "Δloss ± s.e.": _delta(line),
        "bits/weight": _number(line.bits_per_weight, ".2f"),
        "clipped": _number(line.share_clipped, ".4%"),
        "seeds": str(line.seeds),
        "sd over seeds": _number(line.spread, ".4f"),
        "published as": "-" if figure is None else figure.method,
        "published": "-" if figure is None else _published(figure),
        "ours less published": _number(line.off, "+.4f"),
        "source": "-" if figure is None else figure.source,
    }


def _delta(line: Line) -> str:
    if line.difference is None:
        return "-"
    return "0" if (line.scheme, line.engine) == (str(Scheme()), "") else str(line.difference)


def _published(figure: Published) -> str:
    if figure.dataset is None:
        return f"Δ {figure.delta_loss:+.4f}"
    return _perplexity(figure.perplexity)


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, spec)


def _perplexity(value: float | None) -> str:
    return _number(value, ".2f" if value is not None and value < 1e6 else ".2e")


def _title(made: Provenance) -> str:
    versions = version_words(made.versions)
    return (
        f"{made.model} ({made.architecture}; {made.identity()}) on {made.protocol.line()} "
        f"(text {made.text_hash[:23]}); calibrated on {made.calibration}; {made.setting()}; "
        f"{versions}"
    )


def _csv(found: Iterable[Group]) -> str:
    """One line a scheme, numbers in full, the group's identity in front."""
    rows = [_csv_row(group.provenance, line) for group in found for line in group.lines]
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _csv_row(made: Provenance, line: Line) -> dict[str, object]:
    difference, figure = line.difference, line.published
    calibration = None if figure is None else figure.calibration
    protocol, bits = made.protocol, line.bits_per_weight
    return {
        "model": made.model,
        "revision": made.revision,
        "architecture": made.architecture,
        "dataset": protocol.dataset,
        "text_hash": made.text_hash,
        "protocol": protocol.line(),
        "windows": protocol.windows,
        "length": protocol.length,
        "stride": protocol.stride,
        "calibration": made.calibration,
        "batch_size": made.batch_size,
        "dtype": made.dtype,
        "device": made.device,
        "level": made.level,
        "versions": version_words(made.versions),
        "weights": made.weights,
        "scheme": line.scheme,
        "engine": line.engine,
        "overlap": line.overlap,
        "seeds": line.seeds,
        "loss": line.loss,
        "perplexity": line.perplexity,
        "delta_loss": None if difference is None else difference.delta,
        "delta_error": None if difference is None else difference.error,
        "spread_over_seeds": line.spread,
        "bits_per_weight": None if bits is None or math.isnan(bits) else bits,
        "share_clipped": line.share_clipped,
        "published_as": None if figure is None else figure.method,
        "published_calibration": None if calibration is None else calibration.words,
        "published_perplexity": None if figure is None else figure.perplexity,
        "published_delta_loss": None if figure is None else figure.delta_loss,
        "ours_minus_published": line.off,
        "source": None if figure is None else figure.source,
    }
