"""The rows of a run, one after the other: each is kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from fxquant.evaluation.converter import Converter, measure
from fxquant.evaluation.deployed import row_of, run_graph
from fxquant.evaluation.progress import say_finished
from fxquant.evaluation.provenance import Provenance
from fxquant.evaluation.results import Row, in_engine, write_results
from fxquant.evaluation.statistics import WindowSums
from fxquant.evaluation.tables import LEGEND, format_table
from fxquant.evaluation.token_windows import Windows
from fxquant.exports.runtimes import Runtime
from fxquant.ir.counted import counted
from fxquant.run.distributed import is_main
from fxquant.schemes.scheme import Scheme


@dataclass(frozen=True)
class Outcome:
    """Finished rows, what made them, and whether all schemes are there."""

    rows: list[Row]
    provenance: Provenance
    complete: bool


@dataclass(frozen=True)
class Step:
    """A row to be: its name, and what measures it beside the first row's sums, None for itself."""

    name: str
    measure: Callable[[WindowSums | None], Row]


def steps_of(
    converter: Converter,
    schemes: Sequence[Scheme],
    windows: Windows,
    batch_size: int,
    runtime: Runtime | None,
    deployed: Collection[Scheme],
) -> Iterator[Step]:
    """Each scheme's graph and, behind it, what ``runtime`` makes of it where it is in
    ``deployed``. Raises SchemeError for a scheme whose overrides match nothing here."""
    converter.check_overrides(schemes)
    for scheme in schemes:
        yield Step(str(scheme), partial(measure, converter, scheme, windows, batch_size))
        if runtime is not None and scheme in deployed:
            again = partial(deployed_row, converter, scheme, runtime, windows, batch_size)
            yield Step(f"{scheme} in {runtime.name}", again)


def deployed_row(
    converter: Converter,
    scheme: Scheme,
    runtime: Runtime,
    windows: Windows,
    batch_size: int,
    reference: WindowSums | None,
) -> Row:
    """The row of a scheme in an engine; a saved graph has no float model beside it."""
    beside = None if converter.as_it_is else reference
    found = run_graph(
        converter.convert(scheme),
        runtime,
        windows.evaluation,
        batch_size=batch_size,
        scored=windows.scored,
        calibration=converter.calibration,
    )
    return row_of(str(scheme), found, runtime, windows, beside)


def measured(
    steps: Sequence[Step],
    provenance: Provenance,
    output: Path | None,
    say: Callable[[str], None],
) -> Outcome:
    """Take the steps; with ``output``, results.json and table.md there have all finished rows."""
    rows: list[Row] = []

    def keep(complete: bool) -> None:
        if output is not None:
            table = f"{format_table(rows)}\n\n{LEGEND}"
            made = calibrated(provenance, rows)
            write_results(output, rows, made, table, complete=complete)

    keep(complete=False)  # an older run's results must not pass for this one's
    try:
        quiet = None if is_main() else True
        for step in tqdm(steps, "schemes", unit="row", disable=quiet):
            rows.append(step.measure(rows[0].sums if rows else None))
            keep(complete=len(rows) == len(steps))
            say_finished(step.name, rows[-1])
    except KeyboardInterrupt:
        where = f" in {output}" if output is not None and rows else ""
        say(f"interrupted: {_finished(rows, steps)} and kept{where}")
        return Outcome(rows, calibrated(provenance, rows), complete=False)
    except Exception:
        if rows and is_main():
            say(f"{format_table(rows)}\n\n{calibrated(provenance, rows).line()}")
            say(f"stopped: {_finished(rows, steps)}")
        raise
    return Outcome(rows, calibrated(provenance, rows), complete=True)


def _finished(rows: Sequence[Row], steps: Sequence[Step]) -> str:
    done = "is" if len(rows) == 1 else "are"
    return f"{len(rows)} of {counted(len(steps), 'row')} {done} finished"


def calibrated(provenance: Provenance, rows: Sequence[Row]) -> Provenance:
    """With what the rows' graphs were calibrated on, and which were where not all are."""
    known = {row.scheme for row in rows if row.calibration and not row.engine}
    own = [row for row in rows if not row.engine or row.scheme not in known]
    if any(row.calibration is None for row in own):
        return provenance.calibrated(None)
    records = [record for row in own for record in row.calibration or ()]
    reading = [in_engine(row.scheme, row.engine) for row in own if row.calibration]
    others = [row.scheme for row in own if not row.calibration and row.scheme != str(Scheme())]
    return provenance.calibrated(records, reading if others and reading else ())
