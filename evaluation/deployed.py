"""The figures of an exported model in the engine that it was exported for."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.fx import GraphModule
from tqdm import tqdm
from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.errors import ExportError, NonFiniteError
from fxquant.evaluation.models import read_saved_tokenizer, weights_hash
from fxquant.evaluation.overlap import overlap_of
from fxquant.evaluation.perplexity import Perplexity
from fxquant.evaluation.results import Row
from fxquant.evaluation.statistics import Difference, WindowSums, paired_difference
from fxquant.evaluation.token_windows import Windows
from fxquant.exports.runtimes import Losses, Runtime, read_facts
from fxquant.exports.table import FORMATS
from fxquant.exports.target import check_converted, check_scheme
from fxquant.files.temporary import temporary_folder
from fxquant.frontends.pretrained import read_config
from fxquant.ir.calibration import Calibration
from fxquant.ir.graph import GraphInfo, Level, info
from fxquant.recipes import conversion
from fxquant.run.batches import Batches, check_ids
from fxquant.run.distributed import world_size
from fxquant.schemes.scheme import Scheme, brief

FLOAT: Final = Scheme()


@dataclass(frozen=True)
class Deployed:
    """What a row of an engine is made from beside its losses."""

    losses: Perplexity
    export_seconds: float
    calibration: Calibration


def check_deployable(
    runtime: Runtime, graph: GraphModule, schemes: list[Scheme], calibration: Batches | None
) -> None:
    """Raise ExportError for the first scheme that the runtime's format cannot hold, given the data
    to calibrate on that there are, and for several processes, before any work; ``graph``: the float
    one, or one that is saved as it is."""
    if world_size() > 1:
        raise ExportError(f"runtime {runtime.name} runs in one process: start it without torchrun")
    target = FORMATS[runtime.target].target.given(calibration)
    if info(graph).level != Level.FLOAT:
        check_converted(target, graph)
        return
    if target.needs_codes and FLOAT in schemes:
        raise ExportError(
            f"runtime {runtime.name} runs {target.name}, which holds no model in float: give "
            "schemes such as w8 and leave out fp, whose own row stands beside theirs"
        )
    named = conversion.convert(graph, FLOAT, level="float")
    for scheme in schemes:
        check_scheme(target, named, scheme)


def run_exported(
    folder: Path,
    runtime: Runtime,
    windows: Tensor,
    batch_size: int,
    label: str,
    scored: Tensor | None,
) -> Perplexity:
    """Losses of the export in ``folder`` on windows int64 [N, L]: see ``perplexity.evaluate``.

    Raises NonFiniteError where the engine computes NaN or infinity.
    """
    engine = runtime.open(folder)
    started = time.perf_counter()
    losses = _losses(engine, windows, batch_size, f"{label} in {runtime.name}")
    seconds = time.perf_counter() - started
    if not bool(torch.isfinite(losses).all()):
        bad = int((~torch.isfinite(losses)).any(1).nonzero()[0])
        raise NonFiniteError(
            f"{runtime.engine()} computes NaN or infinite losses in window {bad} of {label}"
        )
    return Perplexity(losses, None, seconds, scored)


def _losses(engine: Losses, windows: Tensor, batch_size: int, label: str) -> Tensor:
    batches = windows.split(batch_size)
    bar = tqdm(batches, label, unit="batch", leave=False, disable=None)
    return torch.cat([engine(ids) for ids in bar])


def run_graph(
    gm: GraphModule,
    runtime: Runtime,
    windows: Tensor,
    *,
    batch_size: int = 1,
    scored: Tensor | None = None,
    calibration: Batches | None = None,
) -> Deployed:
    """Export ``gm``, a float or converted graph, to a folder that goes again, and run that;
    ``calibration``: for what the format itself fixes.

    Raises what the export raises, WriteError where the folder cannot be made.
    """
    is_float = info(gm).level == Level.FLOAT
    scheme = str(FLOAT) if is_float else info(gm).scheme
    with temporary_folder(f"the export to {runtime.target} lies there") as parent:
        started = time.perf_counter()
        exported = FORMATS[runtime.target].export(
            gm,
            parent / "export",
            scheme=scheme if is_float else None,
            calibration=calibration,
            check=False,
        )
        seconds = time.perf_counter() - started
        read = read_facts(exported.path, runtime).calibration
        found = run_exported(
            exported.path,
            runtime,
            windows,
            batch_size,
            brief(scheme),
            scored,
        )
    return Deployed(found, seconds, read)


def row_of(
    scheme: str,
    found: Deployed,
    runtime: Runtime,
    windows: Windows,
    reference: WindowSums | None,
) -> Row:
    """A row without what an engine does not count: clipped codes and the bits of weights.

    ``reference``: the float graph's sums, None where there is none."""
    sums = found.losses.sums
    change = Difference(math.nan, None)
    if reference is not None:
        change = paired_difference(sums, reference)
    calibration = found.calibration
    return Row(
        scheme=scheme,
        loss=found.losses.loss,
        perplexity=found.losses.perplexity,
        delta_loss=change.delta,
        delta_error=change.error,
        bits_per_weight=math.nan,
        share_clipped=None,
        convert_seconds=found.export_seconds,
        evaluate_seconds=found.losses.seconds,
        left_in_float=(),
        window_nll=sums.nll,
        window_tokens=sums.tokens,
        calibration=None if calibration is None else tuple(one.brief() for one in calibration),
        overlap=overlap_of(calibration, windows),
        engine=runtime.engine(),
    )


@dataclass(frozen=True)
class LoadedExport:
    """An export with what identifies it; ``revision``: a hash of its weight files."""

    folder: Path
    facts: GraphInfo
    tokenizer: Tokenizer
    config: PretrainedConfig
    revision: str

    @property
    def name(self) -> str:
        return str(self.folder)


def load_export(folder: Path, runtime: Runtime) -> LoadedExport:
    """Raises ExportError for what is no export that ``runtime`` reads or has no tokenizer."""
    facts, tokenizer = read_facts(folder, runtime), read_saved_tokenizer(folder, coded=True)
    if tokenizer is None:
        raise ExportError(
            f"{folder} holds no tokenizer, which an evaluation needs to cut text: export again "
            "with tokenizer=..., or let fxquant export --model name a model that has one"
        )
    revision = weights_hash(folder, ("*.safetensors", "model.onnx*"))
    return LoadedExport(folder, facts, tokenizer, read_config(folder, coded=True), revision)


def measure_export(
    loaded: LoadedExport, runtime: Runtime, windows: Windows, batch_size: int
) -> Row:
    """The row of an export that lies in a folder: there is no float model beside it."""
    check_ids(windows.evaluation, loaded.facts, "evaluation windows")
    found = run_exported(
        loaded.folder,
        runtime,
        windows.evaluation,
        batch_size,
        brief(loaded.facts.scheme),
        windows.scored,
    )
    deployed = Deployed(found, 0.0, loaded.facts.calibration)
    return row_of(loaded.facts.scheme, deployed, runtime, windows, None)
