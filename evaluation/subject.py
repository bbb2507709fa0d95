"""What ``evaluate`` measures: a graph itself, its export in an engine, or an export in a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel

from fxquant.errors import DataError, ExportError
from fxquant.evaluation import perplexity
from fxquant.evaluation.deployed import check_deployable, run_exported, run_graph
from fxquant.evaluation.perplexity import Perplexity
from fxquant.exports.folder import is_export
from fxquant.exports.runtimes import Runtime, engines_of, read_facts, runtime_named
from fxquant.files.doors import Location, as_path
from fxquant.files.tensor_file import dtype_name
from fxquant.frontends.tracing import trace
from fxquant.ir.calibration import Calibration
from fxquant.ir.counted import counted
from fxquant.ir.graph import GraphInfo, Level, device_of, float_dtype, info
from fxquant.ir.streamed import check_present
from fxquant.recipes.running import as_run
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import Scheme, brief


@dataclass(frozen=True)
class Subject:
    """Its facts, and where it is: a graph, or the folder of an export; ``runtime``: what runs it,
    None for the graph itself; ``calibration``: for what its format fixes."""

    facts: GraphInfo
    graph: GraphModule | None
    folder: Path | None
    runtime: Runtime | None
    calibration: Batches | None = None

    @property
    def engine(self) -> str:
        return "" if self.runtime is None else self.runtime.engine()

    @property
    def level(self) -> str:
        return "" if self.runtime is not None else str(self.facts.level)

    def run(
        self, ids: Tensor, batch_size: int, scored: Tensor | None
    ) -> tuple[Perplexity, Calibration]:
        """Losses on windows int64 [N, L], and what was read to calibrate; raises what
        ``perplexity.evaluate`` and exports do."""
        label, made = brief(self.facts.scheme), self.facts.calibration
        if self.folder is not None:
            assert self.runtime is not None
            return run_exported(self.folder, self.runtime, ids, batch_size, label, scored), made
        assert self.graph is not None
        if self.runtime is None:
            found = perplexity.evaluate(
                self.graph, ids, batch_size=batch_size, label=label, scored=scored
            )
            return found, made
        ran = run_graph(
            self.graph,
            self.runtime,
            ids,
            batch_size=batch_size,
            scored=scored,
            calibration=self.calibration,
        )
        return ran.losses, ran.calibration

    def setting(self, batch_size: int) -> str:
        """Batch size, dtype, device and threads, and how an engine was run."""
        if self.runtime is not None:
            where = f"float32 in {self.runtime.words()}"
        else:
            assert self.graph is not None
            where = f"{dtype_name(float_dtype(self.graph))} on {device_of(self.graph)}"
            where += f" at level {self.level}"
        threads = counted(torch.get_num_threads(), "thread")
        return f"batch size {batch_size}, {where} ({threads})"


def subject_of(
    model: PreTrainedModel | GraphModule | Location,
    runtime: str | None,
    level: str,
    calibration: Batches | None,
) -> Subject:
    """With the graph lowered to ``level`` (``as_run``), where it is run itself; ``calibration``:
    for what a runtime's format fixes.

    Raises ExportError for a runtime that is not there, what it cannot hold and a folder that is no
    export for it, DataError for an observed graph, what ``trace`` raises.
    """
    engine = None if runtime is None else runtime_named(runtime, level=level)
    if engine is not None and isinstance(model, str | os.PathLike):
        folder = as_path(model, "model")
        return Subject(read_facts(folder, engine), None, folder, engine)
    if isinstance(model, str | os.PathLike) and is_export(Path(model)):
        target, engines = engines_of(Path(model))
        runs = f"name what runs it, as runtime= ({engines})" if engines else "no runtime runs it"
        raise ExportError(f"{model} is an export to {target}: {runs}")
    graph = model if isinstance(model, GraphModule) else trace(model)
    facts = info(graph)
    check_present(graph)
    if facts.level == Level.OBSERVED:
        raise DataError("an observed graph counts all it sees: evaluate what convert returns")
    if engine is not None:
        check_deployable(engine, graph, [Scheme()], calibration)
        return Subject(facts, graph, None, engine, calibration)
    graph = as_run(graph, level)
    return Subject(info(graph), graph, None, None)
