"""Recipes: from a scheme to a pipeline, and ``convert``, which is trace + pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized

from torch.fx import GraphModule
from transformers import PreTrainedModel

from fxquant.errors import CalibrationError, GraphError, SchemeError, WriteError
from fxquant.files.doors import Location, as_path
from fxquant.frontends.tracing import trace
from fxquant.ir.graph import Level, info, lowered_already
from fxquant.passes import (
    Calibrate,
    Fp32Gemm,
    FuseFp8,
    FuseKernels,
    Integerize,
    NameSites,
    Observe,
    Quantize,
)
from fxquant.pipeline.arguments import checked_call
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import AfterPass, Pass, Pipeline
from fxquant.pipeline.repair import Repair
from fxquant.recipes.repairs import check_cache, check_calibration, resolve_repairs
from fxquant.run.batches import Batch, Batches
from fxquant.run.encodings import batches_of
from fxquant.schemes.scheme import Scheme, SchemeLike, as_scheme

LEVELS = tuple(str(level) for level in Level)


@checked_call(data="calibration", windows="calibration")
def recipe(
    scheme: SchemeLike,
    *,
    calibration: Batches | None = None,
    start: str = "float",
    level: str = "integer",
    progress: bool = False,
    after_pass: AfterPass | None = None,
    cache: Location | None = None,
) -> Pipeline:
    """The passes that take a graph from ``start`` to ``level`` under ``scheme``.

    ``start`` "float" is a graph as ``trace`` makes it. A recipe that stops at a level and one that
    starts there are, one behind the other, the whole recipe: what the scheme does to the float
    function is done at level observed.

    Raises SchemeError (unknown scheme, pass, option or level, a cache that nothing uses) and
    CalibrationError (static ranges without calibration data) before any work is done.
    """
    scheme = as_scheme(scheme)
    stages = _stages(scheme, level)
    folder = None if cache is None else as_path(cache, "cache", WriteError)
    check_cache(scheme, folder)
    passes = [step for each in _levels(start, level) for step in stages[each]]
    repairs = [step for step in passes if isinstance(step, Repair)]
    calibrates = any(isinstance(step, Calibrate) for step in passes)
    check_calibration(scheme, repairs, calibration, calibrates)
    if calibration is not None:
        calibration = _started(calibration)
    context = Context(scheme, calibration, progress, folder)
    return Pipeline(tuple(passes), context, after_pass)


def _levels(start: str, level: str) -> list[Level]:
    """The levels whose passes run: those behind ``start``, up to ``level``."""
    for name in (start, level):
        if name not in LEVELS:
            raise SchemeError(f"unknown level {name!r}: known are {', '.join(LEVELS)}")
    first, last = LEVELS.index(start), LEVELS.index(level)
    if first > last:
        raise SchemeError(f"no pass leads from level {start} back to level {level}")
    # A graph as trace makes it stands before the passes of level float.
    return list(Level)[first + 1 if first else 0 : last + 1]


def _stages(scheme: Scheme, level: str) -> dict[Level, tuple[Pass, ...]]:
    """The passes that lead to each level from the one before."""
    repairs = resolve_repairs(scheme)
    early = tuple(repair for repair in repairs if not repair.after_calibration)
    late = tuple(repair for repair in repairs if repair.after_calibration)
    stages: dict[Level, tuple[Pass, ...]] = {
        Level.FLOAT: (NameSites(), *early),
        Level.OBSERVED: late,
        Level.QDQ: (),
        Level.INTEGER: (),
        Level.KERNELS: (),
        Level.INEXACT: (),
    }
    if scheme.fp32_gemm:
        stages[Level.OBSERVED] = (*late, Fp32Gemm())
    elif any(spec.weight for spec in scheme.specs):
        if scheme.needs_calibration:
            stages[Level.OBSERVED] = (Observe(), Calibrate(), *late)
        elif level == Level.OBSERVED:
            stages[Level.OBSERVED] = (Observe(), *late)
        stages[Level.QDQ] = (Quantize(),)
        stages[Level.INTEGER] = (Integerize(),)
        stages[Level.KERNELS] = (FuseKernels(),)
        stages[Level.INEXACT] = (FuseFp8(),)
    return stages


def _started(batches: Batches) -> Batches:
    """The batches, after a look that there is a first one; a sized collection stays sized."""
    batches = batches_of(batches)
    if isinstance(batches, Sized):
        if len(batches) == 0:
            raise _no_batches()
        return batches
    iterator: Iterator[Batch] = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise _no_batches()
    return itertools.chain([first], iterator)


def _no_batches() -> CalibrationError:
    return CalibrationError(
        "calibration is empty: static ranges need at least one batch with a token in it "
        "(was a one-shot iterator used up?)"
    )


@checked_call(
    data="calibration", windows="calibration", dataset="calibration", calibration_data="calibration"
)
def convert(
    model: PreTrainedModel | GraphModule,
    scheme: SchemeLike,
    *,
    calibration: Batches | None = None,
    level: str = "integer",
    pipeline: Pipeline | None = None,
    progress: bool = False,
    cache: Location | None = None,
) -> GraphModule:
    """Quantize a causal LM: trace it, run the scheme's pipeline, return the lowered graph.

    Args:
        model: a Hugging Face causal LM, or a float graph from ``trace``. Never modified; weights
            that stay float share its storage, so load a state_dict with ``assign=True``
            (torch copies in place otherwise).
        scheme: text such as ``"w8a8-static"`` (docs/schemes.md), a Scheme, its JSON form as a
            dict, or the path of a JSON file that ``fxquant plan`` wrote.
        calibration: iterable of LongTensor [batch, length] or dicts of input_ids and
            attention_mask, such as what a tokenizer returns; one of the latter, or a tensor of
            windows [N, length]. Needed by static schemes, read once.
        level: "float", "observed", "qdq", "integer", "kernels", the same bits by fused operators,
            or "kernels-inexact", whose FP8 products are the device's own and not exact.
        pipeline: runs instead of the scheme's own.
        progress: progress bars, on a terminal.
        cache: a folder in which gptq and refine keep finished blocks, so that the same call goes
            on after an interruption.

    Returns a GraphModule: ``qmodel(input_ids=ids, attention_mask=mask)`` gives logits
    [batch, length, vocab]. It scores text; it does not generate (no cache).

    Threads may convert at once, one model or many, each with calibration data of its own: only
    tracing takes turns (see ``trace``). The results are those of one thread. What is set around a
    call (autocast, inference mode, a default device or dtype) changes no result of any function.

    Raises GraphError (a graph that is quantized already, or is not fxquant's), SchemeError,
    CalibrationError, ModelError, TracingError, NonFiniteError, each before
    work starts where it can be known, and VerificationError if a pass breaks its promise.
    """
    if isinstance(model, GraphModule) and pipeline is None:
        already = lowered_already(info(model))
        if already:
            raise GraphError(already)
    steps = pipeline or recipe(
        scheme, calibration=calibration, level=level, progress=progress, cache=cache
    )
    graph = model if isinstance(model, GraphModule) else trace(model)
    return steps.run(graph)
