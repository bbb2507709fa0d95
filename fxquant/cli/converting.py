"""Convert one model under one scheme, as the command line asks for it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from torch.fx import GraphModule
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.cli.arguments import job_of
from fxquant.evaluation.job import check_job, cut, load, open_sources
from fxquant.evaluation.models import LoadedModel, check_float, finds_tokenizer
from fxquant.ir.graph import set_workspace
from fxquant.ir.streamed import Workspace
from fxquant.pipeline.pipeline import AfterPass
from fxquant.recipes import conversion
from fxquant.recipes.repairs import reads_calibration
from fxquant.recipes.running import AUTO
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import as_scheme


@dataclass(frozen=True)
class Converted:
    """A converted graph, its model's tokenizer and generation config where it has them and they
    are to be kept, and the calibration data where some were cut."""

    graph: GraphModule
    tokenizer: Tokenizer | None
    generation_config: GenerationConfig | None = None
    calibration: Batches | None = None


def convert_as_asked(
    options: argparse.Namespace,
    after_pass: AfterPass | None,
    workspace: Path | None = None,
    check: Callable[[LoadedModel], None] | None = None,
    reads_data: bool = False,
    keeps_tokenizer: bool = False,
) -> Converted:
    """Load ``options.model``, calibrate where ``options.scheme`` needs it, convert; data are cut
    too where what comes next ``reads_data``.

    ``options`` holds what ``arguments.add_model_arguments``, ``add_text_arguments`` and
    ``add_held_out_arguments`` add, and ``scheme`` and ``level``. Calibration keeps apart from the
    windows to evaluate, as in an evaluation. With ``stream``, new leaves go to the folder
    ``workspace``. ``check`` looks at the model before its text is cut and it is converted. A
    tokenizer has to be there where text is cut; else what there is of one is read only where the
    result ``keeps_tokenizer``. Raises FxquantError, before the model is loaded where it can.
    """
    scheme = as_scheme(options.scheme)
    # What --level says here is where to stop, and nothing is measured.
    job = replace(job_of(options, (options.scheme,)), level=AUTO)
    check_job(job)
    check_float(job.model)
    available = [Tensor()] if job.calibration_windows else None
    conversion.recipe(scheme, calibration=available, level=options.level, cache=job.cache)
    calibrates = bool(job.calibration_windows and (reads_data or reads_calibration(scheme)))
    sources = open_sources(job) if calibrates else None
    kept = keeps_tokenizer and (calibrates or finds_tokenizer(job.model, job.revision))
    loaded = load(job, tokenizer=calibrates or kept)
    if check is not None:
        check(loaded)
    batches = cut(job, *sources, loaded).batches if sources else None
    pipeline = conversion.recipe(
        scheme,
        calibration=batches,
        level=options.level,
        progress=True,
        after_pass=after_pass,
        cache=job.cache,
    )
    graph = loaded.graph
    if job.stream and workspace is not None:
        set_workspace(graph, Workspace(workspace))
    generation_config = getattr(loaded.model, "generation_config", None)
    converted = conversion.convert(graph, scheme, pipeline=pipeline)
    tokenizer = loaded.own_tokenizer if kept else None
    return Converted(converted, tokenizer, generation_config, batches)
