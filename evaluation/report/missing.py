"""What a results folder does not hold, and the command that would put it there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxquant.evaluation.report.explanation import Explanation
from fxquant.evaluation.report.inspection import Inspection
from fxquant.evaluation.report.ladder import Ladder


@dataclass(frozen=True)
class Missing:
    """A section of the page without data: what it would show, and how to get it."""

    section: str
    what: str
    command: str


def missing_parts(
    ladders: Sequence[Ladder],
    explanations: Sequence[Explanation],
    inspections: Sequence[Inspection],
    folder: Path,
) -> Iterator[Missing]:
    """The parts that are not in ``folder``, in the order of the page."""
    if not ladders:
        yield Missing(
            "ladder",
            "the loss of each scheme",
            f"fxquant evaluate --model MODEL --schemes w8 w8a8-static --output {folder}",
        )
    elif all(ladder.seeds < 2 for ladder in ladders):
        yield Missing(
            "seeds",
            "error bars over seeds",
            f"fxquant sweep FILE.toml --output {folder}",
        )
    if not explanations:
        yield Missing(
            "explanation",
            "where the error enters, and which cause",
            f"fxquant explain --model MODEL --scheme w8a8-static --output {folder}",
        )
    inspect = (
        "fxquant inspect --model MODEL --scheme w8a8-static --format json "
        f"> {folder / 'inspect.json'}"
    )
    if not any(inspection.histograms for inspection in inspections):
        yield Missing("activations", "activation histograms with their ranges", inspect)
    history = [row for inspection in inspections for row in inspection.history]
    if not history:
        yield Missing("passes", "the pass history with its diffs", inspect)
    elif not any(row.diff for row in history):
        yield Missing("diffs", "what the passes changed, line by line", inspect)
