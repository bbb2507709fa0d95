"""What is said beside a sweep's tables: tokenizers, weights that were coarser, failed cells."""

from __future__ import annotations

from collections.abc import Iterable

from fxquant.evaluation.datasets import tokenizer_note
from fxquant.evaluation.gguf import weights_note
from fxquant.evaluation.journal import Result
from fxquant.evaluation.results import in_engine


def tokenizer_notes(results: Iterable[Result]) -> list[str]:
    """``tokenizer_note`` and ``weights_note`` of each model and text, once."""
    made = [result.provenance for result in results if result.provenance is not None]
    notes = [tokenizer_note(one.model, one.protocol) for one in made]
    notes += [weights_note(one.model, one.weights) for one in made]
    return [note for note in dict.fromkeys(notes) if note]


def failures(results: Iterable[Result]) -> list[Result]:
    """Failed cells that were not done since."""
    listed = list(results)

    def place(result: Result) -> tuple[str, str, str, int | None, str]:
        return result.model, result.scheme, result.dataset, result.seed, result.engine

    done = {place(result) for result in listed if result.error is None}
    return [result for result in listed if result.error and place(result) not in done]


def failed_lines(failed: Iterable[Result]) -> list[str]:
    """One line for all cells of a model and text that failed alike."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for result in failed:
        cell = in_engine(result.scheme, result.engine)
        cell = cell if result.seed is None else f"{cell} (seed {result.seed})"
        alike.setdefault((result.model, result.dataset, str(result.error)), []).append(cell)
    return [
        f"failed: {model} on {dataset}, {', '.join(cells)}: {error}"
        for (model, dataset, error), cells in alike.items()
    ]
