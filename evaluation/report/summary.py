"""The few figures at the top of the page, each with what it belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fxquant.evaluation.report.explanation import Explanation
from fxquant.evaluation.report.inspection import Inspection
from fxquant.evaluation.report.ladder import Ladder, Rung
from fxquant.evaluation.report.tables import Unit, text_of
from fxquant.schemes.scheme import Scheme


@dataclass(frozen=True)
class Fact:
    """A figure, the words over it and the words under it."""

    name: str
    value: str
    note: str


def summary(
    ladders: Sequence[Ladder],
    explanations: Sequence[Explanation],
    inspections: Sequence[Inspection],
) -> Iterator[Fact]:
    """Of the first ladder, explanation and inspection; nothing where there is none."""
    if ladders:
        yield from _of_ladder(ladders[0])
    if explanations:
        yield from _of_explanation(explanations[0])
    elif inspections:
        sites = len(inspections[0].sites.rows)
        yield Fact("Sites", f"{sites:,}", inspections[0].title)


def _of_ladder(ladder: Ladder) -> Iterator[Fact]:
    rungs = [rung for rung in ladder.rungs if _known(rung)]
    reference = next((rung for rung in rungs if rung.scheme == str(Scheme())), None)
    loss = None if reference is None else reference.line.loss
    if loss is not None:
        yield Fact("Float loss", text_of(loss, "loss"), _perplexity(loss))
    quantized = sorted((rung for rung in rungs if rung is not reference), key=_cost)
    if quantized:
        yield _delta("Least Δloss", quantized[0])
    if len(quantized) > 1:
        yield _delta("Greatest Δloss", quantized[-1])
    failed = [rung for rung in ladder.rungs if rung.error is not None]
    if failed:
        yield Fact("Failed", str(len(failed)), ", ".join(rung.scheme for rung in failed))


def _of_explanation(explanation: Explanation) -> Iterator[Fact]:
    if explanation.causes and explanation.causes[0][0] == "whole model":
        cause, value = max(explanation.causes[0][1].items(), key=lambda item: abs(item[1]))
        unit: Unit = "nats"
        note = f"nats of {text_of(explanation.delta_loss, unit)}, from {explanation.title}"
        yield Fact(f"Largest cause: {cause}", text_of(value, unit), note)
    yield Fact("Sites explained", f"{len(explanation.cells):,}", "quantized operators")


def _delta(name: str, rung: Rung) -> Fact:
    error = rung.standard_error
    spread = "" if error is None else f" ± {error:.4f}"
    return Fact(name, text_of(rung.delta_loss, "nats"), f"{rung.scheme}{spread}")


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700))
    return f"perplexity {value:.2f}" if value < 1e6 else f"perplexity {value:.2e}"


def _known(rung: Rung) -> bool:
    return rung.delta_loss is not None and math.isfinite(rung.delta_loss)


def _cost(rung: Rung) -> float:
    return rung.delta_loss or 0.0
