"""What an export starts from: a quantized graph as it is, or a float model and a scheme."""

from __future__ import annotations

from typing import TypeAlias

from torch.fx import GraphModule
from transformers import GenerationConfig, PreTrainedModel

from fxquant.errors import SchemeError
from fxquant.exports.target import Target, check_converted, check_possible, refusing
from fxquant.frontends.tracing import trace
from fxquant.ir.graph import Level, info
from fxquant.ir.streamed import check_present
from fxquant.passes import Integerize
from fxquant.recipes import conversion
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import SchemeLike, as_scheme

Source: TypeAlias = PreTrainedModel | GraphModule


def converted(
    source: Source, target: Target, scheme: SchemeLike | None, calibration: Batches | None
) -> GraphModule:
    """The graph that ``target`` is written from, of which it can hold all.

    Raises ExportError for what it cannot, where that can be known before any work; SchemeError for
    a quantized graph with a scheme and a float one without; else as ``convert`` does.
    """
    check_possible(target)
    is_graph = isinstance(source, GraphModule)
    if is_graph and info(source).level in (Level.QDQ, Level.INTEGER):
        if scheme is not None:
            raise SchemeError(
                f"the graph is quantized already (scheme {info(source).scheme}): leave out scheme"
            )
        check_present(source)
        check_converted(target, source)
        if target.level == Level.INTEGER and info(source).level == Level.QDQ:
            return Integerize()(source)
        return source
    if is_graph and info(source).level != Level.FLOAT:
        raise SchemeError(
            f"the graph is at level {info(source).level}: export takes float, qdq and integer; "
            "convert the model with level='integer'"
        )
    if scheme is None:
        raise SchemeError("a float model is exported under a scheme: pass scheme='w8', for one")
    wanted = as_scheme(scheme)
    pipeline = conversion.recipe(
        wanted, calibration=calibration, level=target.level, after_pass=refusing(target, wanted)
    )
    graph = source if is_graph else trace(source)
    result = conversion.convert(graph, wanted, pipeline=pipeline)
    check_converted(target, result)
    return result


def generation_of(source: Source, given: GenerationConfig | None) -> GenerationConfig | None:
    """How text is generated: what was given, else what a model has, None for a graph."""
    return given or getattr(source, "generation_config", None)
