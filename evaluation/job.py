"""Evaluate schemes on one model and one set of windows: the main job."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.checkpoint.manifest import is_checkpoint
from fxquant.errors import DataError, SchemeError
from fxquant.evaluation.converter import Converter
from fxquant.evaluation.data import (
    Source,
    check_batch_size,
    check_counts,
    check_seed,
    cut_windows,
    load_text,
)
from fxquant.evaluation.datasets import check_dataset, open_source
from fxquant.evaluation.deployed import (
    LoadedExport,
    check_deployable,
    load_export,
    measure_export,
)
from fxquant.evaluation.models import (
    LoadedModel,
    check_device,
    load_model,
    resolve_dtype,
    versions,
)
from fxquant.evaluation.overlap import check_saved_apart
from fxquant.evaluation.provenance import Provenance, architecture
from fxquant.evaluation.results import prepare_folder
from fxquant.evaluation.rows import Outcome, Step, measured, steps_of
from fxquant.evaluation.starting import check_saved
from fxquant.evaluation.token_windows import Windows
from fxquant.exports.folder import is_export
from fxquant.exports.runtimes import Runtime, runtime_named
from fxquant.files.doors import as_path
from fxquant.files.locks import check_writable, hold_folder
from fxquant.files.tensor_file import dtype_name
from fxquant.ir.graph import GraphInfo, Level, float_dtype, info, set_workspace
from fxquant.ir.streamed import Workspace, workspace_folder
from fxquant.recipes import conversion
from fxquant.recipes.repairs import can_resume
from fxquant.recipes.running import AUTO, as_run, running_level
from fxquant.run.batches import check_ids
from fxquant.run.distributed import world_size
from fxquant.schemes.scheme import Scheme, as_scheme


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
    data: Path | None = None  # text and whatever else is a path are made one
    device: str = "cpu"
    level: str = AUTO
    dtype: str = "auto"
    revision: str | None = None
    seed: int = 0
    output: Path | None = None
    overwrite: bool = False
    stream: bool = False
    cache: Path | None = None
    allow_overlap: bool = False
    runtime: str | None = None
    command: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("data", "output", "cache"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, as_path(given, name))
        if self.runtime is not None and self.level == AUTO:  # what exports are written from
            object.__setattr__(self, "level", str(Level.INTEGER))


def run(job: Job, say: Callable[[str], None] = print) -> Outcome:
    """Evaluate every scheme of the job, the float model first; rows are written as they finish.

    Raises FxquantError for bad input before any model is loaded or converted where that can be
    known, and where another run writes to the job's output. An interruption (Ctrl-C) keeps the
    finished rows: ``complete`` is False then. Any other end after the first row says them.

    With ``runtime``, a row of that engine, running the exported model, stands beside each graph's
    (the float one's where ``fp`` is among the schemes); an export's folder has its row alone.
    """
    check_saved(job.model, job.schemes, job.runtime)
    if is_checkpoint(Path(job.model)) or is_export(Path(job.model)):
        job = replace(job, calibration_windows=0)  # it brings what it was calibrated on
    schemes = check_job(job)
    with hold_folder(job.output):
        if job.output is not None:
            prepare_folder(job.output, job.overwrite)
        return _run(job, schemes, say)


def _run(job: Job, schemes: list[Scheme], say: Callable[[str], None]) -> Outcome:
    source, other = open_sources(job)
    if is_export(Path(job.model)):
        return _run_export(job, source, say)
    loaded = load(job)
    windows = cut(job, source, other, loaded)
    graph = loaded.graph if job.schemes or job.runtime else as_run(loaded.graph, job.level)
    torch.manual_seed(job.seed)
    check_windows(windows, graph)
    provenance = make_provenance(job, loaded, graph, source, windows)
    if isinstance(loaded.model, GraphModule):
        if not job.schemes:
            schemes = [Scheme.parse(info(graph).scheme)]
            provenance = replace(provenance, level=str(info(graph).level))
        if not job.allow_overlap:
            check_saved_apart(info(graph).calibration, windows, job.model)
    with workspace_for(graph, job.stream):
        return _rows(job, schemes, graph, windows, provenance, say)


def _run_export(job: Job, source: Source, say: Callable[[str], None]) -> Outcome:
    runtime = runtime_of(job)
    assert runtime is not None
    loaded = load_export(Path(job.model), runtime)
    windows = cut(job, source, None, loaded)
    if not job.allow_overlap:
        check_saved_apart(loaded.facts.calibration, windows, job.model)
    provenance = provenance_of(job, loaded, loaded.facts, "float32", source, windows)
    step = Step(
        loaded.facts.scheme, lambda _: measure_export(loaded, runtime, windows, job.batch_size)
    )
    return measured([step], replace(provenance, level=""), job.output, say)


def runtime_of(job: Job) -> Runtime | None:
    """The engine that exported models are run in; raises what ``runtime_named`` does."""
    return None if job.runtime is None else runtime_named(job.runtime, job.device, job.level)


def deployed_schemes(job: Job) -> list[Scheme]:
    """Those whose export is run: the float model's where it is named, as not all hold it."""
    return [as_scheme(each) for each in job.schemes]


def load(job: Job, tokenizer: bool = True) -> LoadedModel:
    """The job's model, without its tokenizer as ``load_model`` has it; raises what that does."""
    return load_model(
        job.model, dtype=job.dtype, device=job.device, revision=job.revision,
        streamed=job.stream, tokenizer=tokenizer)  # fmt: skip


def check_job(job: Job) -> list[Scheme]:
    """The job's schemes, after every check that needs no text and no model.

    Raises FxquantError: SchemeError, CalibrationError, DataError or ModelError.
    """
    check_seed(job.seed)
    check_batch_size(job.batch_size)
    check_counts(job.windows, job.length, job.calibration_windows, job.stride)
    length = job.length if job.calibration_length is None else job.calibration_length
    check_counts(1, length, job.calibration_windows, what="calibration window")
    check_device(job.device)
    runtime_of(job)
    resolve_dtype(job.dtype, job.device)
    running_level(job.level, job.device)
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


def cut(
    job: Job, source: Source, calibration: Source | None, loaded: LoadedModel | LoadedExport
) -> Windows:
    """The job's windows."""
    windows = cut_windows(
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
        allow_overlap=job.allow_overlap,
    )
    if windows.origin is None:
        return windows
    return replace(windows, origin=replace(windows.origin, command=job.command))


def check_windows(windows: Windows, graph: GraphModule) -> None:
    """Raise DataError for token ids that the model has not, or windows longer than it takes."""
    check_ids(windows.evaluation, info(graph), "evaluation windows")
    check_ids(windows.calibration, info(graph), "calibration windows")


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
    """Parsed (a path that ends in .json: read), without repetitions, ``fp`` first in any case."""
    parsed = [Scheme(), *map(as_scheme, texts)]
    return list(dict.fromkeys(parsed))


def _rows(
    job: Job,
    schemes: list[Scheme],
    graph: GraphModule,
    windows: Windows,
    provenance: Provenance,
    say: Callable[[str], None],
) -> Outcome:
    runtime, as_it_is = runtime_of(job), not job.schemes
    converter = Converter(
        *(graph, windows.batches, job.cache, as_it_is),
        keeps_last=runtime is not None,
        level=running_level(job.level, job.device),
    )
    deployed = schemes if as_it_is else deployed_schemes(job)
    if runtime is not None:
        check_deployable(runtime, graph, deployed, windows.batches)
    steps = steps_of(converter, schemes, windows, job.batch_size, runtime, deployed)
    return measured(list(steps), provenance, job.output, say)


def make_provenance(
    job: Job,
    loaded: LoadedModel,
    graph: GraphModule,
    source: Source,
    windows: Windows,
) -> Provenance:
    """What made the job's numbers, with what the graph it starts from was calibrated on."""
    dtype = dtype_name(float_dtype(graph))
    return provenance_of(job, loaded, info(graph), dtype, source, windows)


def provenance_of(
    job: Job,
    loaded: LoadedModel | LoadedExport,
    facts: GraphInfo,
    dtype: str,
    source: Source,
    windows: Windows,
) -> Provenance:
    """As make_provenance, of a graph that need not be here."""
    runtime = runtime_of(job)
    made = Provenance(
        model=loaded.name,
        revision=loaded.revision,
        architecture=architecture(loaded.config),
        dataset=source.name,
        text_hash=source.digest,
        windows_hash=windows.digest,
        protocol=windows.protocol,
        windows=len(windows.evaluation),
        length=job.length,
        calibration="",
        calibration_windows=None,
        batch_size=job.batch_size,
        dtype=dtype,
        device=job.device,
        seed=None,
        threads=torch.get_num_threads(),
        versions=versions(),
        command=job.command,
        processes=world_size(),
        weights=facts.weights,
        engine="" if runtime is None else runtime.words(),
        level=running_level(job.level, job.device),
    )
    return made.calibrated(facts.calibration)
