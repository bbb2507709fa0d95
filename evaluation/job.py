"""Evaluate schemes on one model and one set of windows: the main job."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule
from tqdm import tqdm

from fxquant import conversion
from fxquant.batches import check_ids
from fxquant.distributed import is_main, world_size
from fxquant.errors import DataError, SchemeError
from fxquant.evaluation.converter import Converter, measure
from fxquant.evaluation.data import Source, Windows, check_counts, cut_windows, load_text
from fxquant.evaluation.datasets import check_dataset, open_source
from fxquant.evaluation.models import LoadedModel, check_device, load_model, resolve_dtype, versions
from fxquant.evaluation.provenance import Provenance, architecture
from fxquant.evaluation.results import Row, prepare_folder, write_results
from fxquant.evaluation.tables import format_table
from fxquant.graph import Level, float_dtype, info, set_workspace
from fxquant.locks import check_writable, hold_folder
from fxquant.manifest import is_checkpoint
from fxquant.repairs import can_resume
from fxquant.schemes import Scheme
from fxquant.streamed import Workspace, workspace_folder


@dataclass(frozen=True)
class Job:
    """What ``fxquant evaluate`` is asked: see its --help."""

    model: str
    schemes: tuple[str, ...]
    dataset: str | None = None
    text: str = "builtin"
    windows: int | None = 8
    length: int = 512
    stride: int | None = None
    batch_size: int = 1
    calibration_windows: int = 16
    calibration_length: int | None = None
    calibration_dataset: str | None = None
    data: Path | None = None
    device: str = "cpu"
    dtype: str = "auto"
    revision: str | None = None
    seed: int = 0
    output: Path | None = None
    overwrite: bool = False
    stream: bool = False
    cache: Path | None = None
    command: str = field(default="", compare=False)


@dataclass(frozen=True)
class Outcome:
    """Finished rows, what made them, and whether all schemes are there."""

    rows: list[Row]
    provenance: Provenance
    complete: bool


def run(job: Job, say: Callable[[str], None] = print) -> Outcome:
    """Evaluate every scheme of the job, the float model first; rows are written as they finish.

    Raises FxquantError for bad input before any model is loaded or converted where that can be
    known, and where another run writes to the job's output. An interruption (Ctrl-C) keeps the
    finished rows: ``complete`` is False then. Any other end after the first row says them.
    """
    check_saved(job)
    schemes = check_job(job)
    with hold_folder(job.output):
        if job.output is not None:
            prepare_folder(job.output, job.overwrite)
        return _run(job, schemes, say)


def _run(job: Job, schemes: list[Scheme], say: Callable[[str], None]) -> Outcome:
    source, other = open_sources(job)
    loaded = load_model(
        job.model, dtype=job.dtype, device=job.device, revision=job.revision, streamed=job.stream
    )
    windows = cut(job, source, other, loaded)
    torch.manual_seed(job.seed)
    graph = loaded.graph
    check_ids(windows.evaluation, info(graph), "evaluation windows")
    provenance = make_provenance(job, loaded, graph, source, other, windows)
    if isinstance(loaded.model, GraphModule):
        schemes = [Scheme.parse(info(graph).scheme)]
    with workspace_for(graph, job.stream):
        return _rows(job, schemes, graph, windows, provenance, say)


def check_job(job: Job) -> list[Scheme]:
    """The job's schemes, after every check that needs no text and no model.

    Raises FxquantError: SchemeError, CalibrationError, DataError or ModelError.
    """
    if job.batch_size < 1:
        raise DataError(f"batch size must be at least 1, got {job.batch_size}")
    check_counts(job.windows, job.length, job.calibration_windows, job.stride)
    check_counts(1, job.calibration_length or job.length, job.calibration_windows)
    check_device(job.device)
    resolve_dtype(job.dtype, job.device)
    for name in (job.dataset, job.calibration_dataset):
        if name is not None:
            check_dataset(name)
    schemes = ordered_schemes(job.schemes)
    for scheme in schemes:
        enough: tuple[Tensor, ...] | None = (torch.empty(0),) if job.calibration_windows else None
        conversion.recipe(scheme, calibration=enough)
    if job.cache is not None and not any(can_resume(scheme) for scheme in schemes):
        raise SchemeError(
            f"cache {job.cache}: no scheme here has a repair that keeps finished blocks: leave it "
            "out"
        )
    if job.cache is not None:
        check_writable(job.cache, "cache folder")
    return schemes


def open_sources(job: Job) -> tuple[Source, Source | None]:
    """The text to evaluate on, and the one to calibrate on where it is another.

    Texts that are equal are one source, whatever they are called: its calibration windows are
    those that evaluation leaves. Raises DataError where calibration would draw from the evaluated
    split of a text that has another one to calibrate on.
    """
    name = job.text if job.dataset is None else job.dataset
    source = load_text(name) if job.dataset is None else open_source(name, job.data)
    if job.calibration_dataset in (None, name) or job.calibration_windows == 0:
        return source, None
    other = open_source(str(job.calibration_dataset), job.data)
    if not other.draws_from(source.evaluation):
        return source, other
    if source.calibration_documents is None:
        return source, None
    raise DataError(
        f"calibration dataset {job.calibration_dataset} is the very text that {name} evaluates on; "
        f"omit it to calibrate on {name}'s {source.recipe.calibration_split}"
    )


def cut(job: Job, source: Source, calibration: Source | None, loaded: LoadedModel) -> Windows:
    """The job's windows."""
    return cut_windows(
        source,
        loaded.tokenizer,
        count=job.windows,
        length=job.length,
        calibration=job.calibration_windows,
        seed=job.seed,
        stride=job.stride,
        calibration_length=job.calibration_length,
        calibration_source=calibration,
        revision=job.revision,
    )


def check_saved(job: Job) -> None:
    """Raise DataError where schemes and model do not go together: a saved graph has its own."""
    saved = is_checkpoint(Path(job.model))
    if saved and job.schemes:
        raise DataError(
            f"{job.model} is a saved graph, which has its scheme: omit --schemes to evaluate it"
        )
    if not saved and not job.schemes:
        raise DataError("give --schemes, such as w8 w8a8-static (only a saved graph has its own)")


@contextlib.contextmanager
def workspace_for(graph: GraphModule, streamed: bool) -> Iterator[None]:
    """A folder for the leaves that conversions of a streamed graph make, while they are needed."""
    if not streamed or info(graph).level != Level.FLOAT:
        yield
        return
    with workspace_folder() as folder:
        set_workspace(graph, Workspace(folder))
        yield


def ordered_schemes(texts: tuple[str, ...]) -> list[Scheme]:
    """Parsed, without repetitions, ``fp`` first whether asked for or not."""
    parsed = [Scheme(), *(Scheme.parse(text) for text in texts)]
    return list(dict.fromkeys(parsed))


def _rows(
    job: Job,
    schemes: list[Scheme],
    graph: GraphModule,
    windows: Windows,
    provenance: Provenance,
    say: Callable[[str], None],
) -> Outcome:
    rows: list[Row] = []
    converter = Converter(graph, windows.calibration, job.cache)

    def keep(complete: bool) -> None:
        if job.output is not None:
            write_results(job.output, rows, provenance, format_table(rows), complete=complete)

    keep(complete=False)  # an older run's results must not pass for this one's
    try:
        quiet = None if is_main() else True
        for scheme in tqdm(schemes, "schemes", unit="scheme", disable=quiet):
            reference = rows[0].sums if rows else None
            rows.append(measure(converter, scheme, windows, job.batch_size, reference))
            keep(complete=len(rows) == len(schemes))
    except KeyboardInterrupt:
        where = f" in {job.output}" if job.output is not None and rows else ""
        say(f"interrupted: {len(rows)} of {len(schemes)} rows are finished and kept{where}")
        return Outcome(rows, provenance, complete=False)
    except Exception:
        if rows and is_main():
            say(f"{format_table(rows)}\n\n{provenance.line()}")
            say(f"stopped: {len(rows)} of {len(schemes)} rows are finished")
        raise
    return Outcome(rows, provenance, complete=True)


def make_provenance(
    job: Job,
    loaded: LoadedModel,
    graph: GraphModule,
    source: Source,
    calibration: Source | None,
    windows: Windows,
) -> Provenance:
    """What made the job's numbers."""
    drawn = calibration or source
    amount, length = windows.calibration.shape
    return Provenance(
        model=loaded.name,
        revision=loaded.revision,
        architecture=architecture(loaded.config),
        dataset=source.name,
        text_hash=source.digest,
        windows_hash=windows.digest,
        protocol=windows.protocol,
        windows=len(windows.evaluation),
        length=job.length,
        calibration=(
            f"{amount} windows of {length} from {drawn.name} ({drawn.recipe.calibration_split}, "
            f"{drawn.recipe.sampler})"
            if amount
            else "nothing"
        ),
        calibration_windows=amount,
        batch_size=job.batch_size,
        dtype=str(float_dtype(graph)).removeprefix("torch."),
        device=job.device,
        seed=job.seed,
        threads=torch.get_num_threads(),
        versions=versions(),
        command=job.command,
        processes=world_size(),
    )
