"""models × schemes × datasets × seeds, one result a line, that goes on where it was stopped."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch.fx import GraphModule
from tqdm import tqdm

from fxquant.errors import DistributedError, FxquantError, WriteError, notes_of
from fxquant.evaluation.converter import Converter, measure
from fxquant.evaluation.data import Source
from fxquant.evaluation.deployed import check_deployable
from fxquant.evaluation.fingerprint import (
    Identity,
    depends_on_seed,
    fingerprint,
    identify_model,
    unavailable,
)
from fxquant.evaluation.job import (
    Job,
    check_job,
    check_windows,
    cut,
    deployed_schemes,
    load,
    make_provenance,
    open_sources,
    runtime_of,
    workspace_for,
)
from fxquant.evaluation.journal import Journal, Result
from fxquant.evaluation.models import LoadedModel, check_float, check_no_export
from fxquant.evaluation.progress import say_finished
from fxquant.evaluation.results import Row, in_engine
from fxquant.evaluation.rows import deployed_row
from fxquant.evaluation.statistics import WindowSums
from fxquant.evaluation.sweep_tables import format_results
from fxquant.evaluation.token_windows import Windows
from fxquant.exports.runtimes import Runtime
from fxquant.ir.counted import counted
from fxquant.recipes.running import running_level
from fxquant.schemes.scheme import Scheme


@dataclass(frozen=True)
class Sweep:
    """Every scheme of ``job`` on each model, dataset and seed; ``job`` has the common setting, and
    its own model, dataset and seed do not count."""

    models: tuple[str, ...]
    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    job: Job

    def jobs(self) -> Iterator[Job]:
        """One job for each model, dataset and seed, in this order of nesting."""
        for model, dataset, seed in itertools.product(self.models, self.datasets, self.seeds):
            yield replace(self.job, model=model, dataset=dataset, seed=seed)


@dataclass(frozen=True)
class SweepOutcome:
    """The cells' results in the sweep's order, and how many were done before, now and in vain."""

    results: list[Result]
    before: int
    now: int
    failed: int


@dataclass(frozen=True)
class _Cell:
    """One result to be, the graph's own or a runtime's. ``broken``: why it cannot be computed."""

    job: Job
    scheme: Scheme
    runtime: Runtime | None
    fingerprint: str
    broken: str | None = None

    @property
    def is_reference(self) -> bool:
        """Whether differences are to it: the float graph."""
        return self.scheme == Scheme() and self.runtime is None

    @property
    def engine(self) -> str:
        return "" if self.runtime is None else self.runtime.engine()

    @property
    def seed(self) -> int | None:
        return self.job.seed if depends_on_seed(self.scheme, self.runtime) else None

    def unavailable(self, reason: str) -> _Cell:
        """The cell where it cannot even be begun, which is not kept under its own fingerprint."""
        name = unavailable(self.job, self.scheme, reason, self.runtime)
        return replace(self, fingerprint=name, broken=reason)

    def failed(self, reason: str) -> Result:
        dataset = str(self.job.dataset)
        return Result(
            self.fingerprint,
            self.job.model,
            str(self.scheme),
            dataset,
            self.seed,
            error=reason,
            engine=self.engine,
        )


Sources = tuple[Source, Source | None]
T = TypeVar("T")


def run_sweep(
    sweep: Sweep, path: Path, *, retry_failed: bool = False, say: Callable[[str], None] = print
) -> SweepOutcome:
    """Compute what results.jsonl at ``path`` lacks; a model is loaded once for all its cells.

    The setting and all schemes are checked first (FxquantError), and that no other sweep writes
    there (WriteError; where results cannot be kept too, and what is finished is said then). After
    that a cell that fails, or whose model or text cannot be read, is recorded with its error and
    the rest goes on. Recorded failures are not tried again without ``retry_failed``, unless a
    model, its weights or a text was missing.
    """
    check_processes()
    for job in sweep.jobs():
        check_no_export(job.model)
        if job.schemes:
            check_float(job.model)
    schemes = [scheme for job in sweep.jobs() for scheme in check_job(job)]
    schemes = list(dict.fromkeys(schemes))
    with Journal(path) as journal:
        sources = {name: _try(partial(_open, sweep, name)) for name in sweep.datasets}
        models = {
            name: _try(partial(identify_model, name, sweep.job.revision)) for name in sweep.models
        }
        cells = list(_cells(sweep, schemes, sources, models))
        done = {
            key for key, result in journal.results.items() if not (retry_failed and result.error)
        }
        missing = [cell for cell in cells if cell.fingerprint not in done]
        before = len(cells) - len(missing)
        say(f"{counted(len(cells), 'cell')}, {before} already in {path}")
        bar = tqdm(total=len(missing), desc="cells", unit="cell", disable=None)
        run = _Run(journal, cells, sources, bar.update)
        try:
            for _, group in itertools.groupby(missing, key=lambda cell: cell.job.model):
                run.model(list(group))
                gc.collect()
        except WriteError:
            say(f"\n{format_results(run.finished())}\n")
            raise
        finally:
            bar.close()
        results = [run.result(cell) for cell in cells]
    failed = sum(result.error is not None for result in results)
    return SweepOutcome(results, before, len(missing), failed)


def check_processes() -> None:
    """Raise DistributedError under torchrun: every process would do, and write, the same cells."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise DistributedError(
            f"a sweep runs in one process, and torchrun started {processes}; for one model and "
            f"text in many: torchrun --nproc-per-node {processes} -m fxquant.evaluation"
        )


def _try(step: Callable[[], T]) -> T | str:
    """The step's value, or what went wrong in one line."""
    try:
        return step()
    except Exception as error:
        return describe(error)


def describe(error: Exception) -> str:
    """An exception in one line: its kind where it is not ours, its text and notes."""
    text = " ".join(str(error).split()) or repr(error)
    kind = "" if isinstance(error, FxquantError) else f"{type(error).__name__}: "
    return f"{kind}{text}{notes_of(error)}"


def _open(sweep: Sweep, dataset: str) -> Sources:
    return open_sources(replace(sweep.job, dataset=dataset))


def _cells(
    sweep: Sweep,
    schemes: Sequence[Scheme],
    sources: dict[str, Sources | str],
    models: dict[str, Identity | str],
) -> Iterator[_Cell]:
    for job in sweep.jobs():
        source, model = sources[str(job.dataset)], models[job.model]
        for scheme in schemes:
            for runtime in _runners(job, scheme):
                if not depends_on_seed(scheme, runtime) and job.seed != sweep.seeds[0]:
                    continue
                cell = _Cell(job, scheme, runtime, "")
                broken = [found for found in (model, source) if isinstance(found, str)]
                if isinstance(source, str) or isinstance(model, str):
                    yield cell.unavailable("; ".join(broken))
                else:
                    name = fingerprint(job, scheme, model, *source, runtime=runtime)
                    yield replace(cell, fingerprint=name)


def _runners(job: Job, scheme: Scheme) -> list[Runtime | None]:
    """What runs a scheme: the graph itself, and the job's runtime where the scheme is named."""
    runtime = runtime_of(job)
    return [None] if runtime is None or scheme not in deployed_schemes(job) else [None, runtime]


class _Run:
    """The cells of one sweep being computed into its journal."""

    def __init__(
        self,
        journal: Journal,
        cells: Iterable[_Cell],
        sources: dict[str, Sources | str],
        step: Callable[[], object],
    ) -> None:
        self.journal, self.sources, self.step = journal, sources, step
        self.cells = list(cells)
        self.unloaded: dict[str, str] = {}
        self.references = {
            (cell.job.model, cell.job.dataset): cell.fingerprint
            for cell in self.cells
            if cell.is_reference
        }

    def record(self, result: Result) -> None:
        if self.journal.results.get(result.fingerprint) != result:
            self.journal.append(result)
        self.step()

    def result(self, cell: _Cell) -> Result:
        """What is recorded of a cell, under another name where its model could not be loaded."""
        found = self.journal.results.get(cell.fingerprint)
        if found is None:
            again = cell.unavailable(self.unloaded[cell.job.model])
            found = self.journal.results[again.fingerprint]
        return found

    def finished(self) -> list[Result]:
        """Of this sweep's cells, whether they could be kept or not."""
        found = map(self.journal.results.get, [cell.fingerprint for cell in self.cells])
        return [result for result in found if result is not None]

    def fail(self, cells: Iterable[_Cell], reason: str) -> None:
        for cell in cells:
            self.record(cell.failed(cell.broken or reason))

    def model(self, cells: list[_Cell]) -> None:
        """All missing cells of one model."""
        self.fail((cell for cell in cells if cell.broken), "")
        cells = [cell for cell in cells if not cell.broken]
        if not cells:
            return
        first = cells[0].job
        loaded = _try(partial(load, first))
        if isinstance(loaded, str):
            self.unloaded[first.model] = loaded
            self.fail((cell.unavailable(loaded) for cell in cells), loaded)
            return
        torch.manual_seed(first.seed)
        graph = _try(lambda: loaded.graph)
        if isinstance(graph, str):
            self.fail(cells, graph)
            return
        with workspace_for(graph, first.stream):
            for _, group in itertools.groupby(cells, key=lambda c: (c.job.dataset, c.job.seed)):
                self.windows(list(group), loaded, graph)

    def windows(self, cells: list[_Cell], loaded: LoadedModel, graph: GraphModule) -> None:
        """The missing cells of one model, dataset and seed."""
        job = cells[0].job
        sources = self.sources[str(job.dataset)]
        assert not isinstance(sources, str)
        try:
            windows = cut(job, *sources, loaded)
            check_windows(windows, graph)
        except Exception as error:
            self.fail(cells, describe(error))
            return
        provenance = make_provenance(job, loaded, graph, sources[0], windows)
        converter = Converter(
            graph,
            windows.batches,
            job.cache,
            keeps_last=job.runtime is not None,
            level=running_level(job.level, job.device),
        )
        for cell in cells:
            try:
                torch.manual_seed(job.seed)
                row = self.row(cell, converter, windows)
            except WriteError:
                raise  # no cell's fault, and the next would meet it too
            except Exception as error:
                self.record(cell.failed(describe(error)))
                continue
            seed = "" if cell.seed is None else f", seed {cell.seed}"
            name = in_engine(str(cell.scheme), cell.engine)
            say_finished(f"{job.model}, {job.dataset}, {name}{seed}", row)
            self.record(
                replace(
                    cell.failed(""),
                    error=None,
                    protocol=windows.protocol,
                    figures=row,
                    provenance=provenance.calibrated(row.calibration),
                )
            )

    def row(self, cell: _Cell, converter: Converter, windows: Windows) -> Row:
        """The cell's figures."""
        reference, size = self.reference(cell), cell.job.batch_size
        if cell.runtime is None:
            return measure(converter, cell.scheme, windows, size, reference)
        check_deployable(cell.runtime, converter.graph, [cell.scheme], windows.batches)
        return deployed_row(converter, cell.scheme, cell.runtime, windows, size, reference)

    def reference(self, cell: _Cell) -> WindowSums | None:
        """The float model's sums on the cell's windows; None for the float model itself."""
        if cell.is_reference:
            return None
        result = self.journal.results[self.references[cell.job.model, cell.job.dataset]]
        if result.figures is None:
            raise FxquantError("not run: the float model's evaluation on these windows failed")
        return result.figures.sums
