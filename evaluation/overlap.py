"""Evaluation windows that hold what a graph was calibrated on: their loss is not of unseen text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fxquant.errors import DataError
from fxquant.evaluation.datasets import NAMED
from fxquant.ir.calibration import Calibration, Origin, Spans, calibration_words
from fxquant.ir.token_runs import chosen_runs, read_runs, share_known

if TYPE_CHECKING:
    from fxquant.evaluation.token_windows import Windows

# Of an evaluation window's runs of tokens that calibration saw in another text: it is a copy.
COPIED = 0.5


def calibrated_windows(calibration: Calibration, windows: Windows) -> tuple[int, ...]:
    """Indices of the evaluation windows that hold what the calibration read.

    In the same text, whatever it is called, by position: one token is enough, and where two
    tokenizers do not agree on it the whole text counts. A copy inside another text, and the tokens
    of batches that came without a text, are told by their runs: a window of which more than half is
    known. Between two named datasets, whose protocols are the papers', only the same text counts.
    """
    found = (_shared(each.origin, read_runs(each.runs), windows) for each in calibration or ())
    return tuple(sorted(set().union(*found)))


def _shared(origin: Origin | None, runs: set[str], windows: Windows) -> set[int]:
    if origin is None:
        return set(_copied(Spans(), runs, windows))
    same = set(_same_text(origin.spans, windows.places))
    if {origin.source, windows.protocol.dataset} <= set(NAMED):
        return same
    return same | set(_copied(origin.spans, runs, windows))


def _same_text(drawn: Spans, places: Spans) -> Iterator[int]:
    tokens = {text.text_hash: text for text in drawn.texts}
    taken: dict[str, list[tuple[int, int]]] = {}
    for text, first, end in drawn.spans:
        taken.setdefault(drawn.texts[text].text_hash, []).append((first, end))
    for index, (text, first, end) in enumerate(places.spans):
        here = places.texts[text]
        spans = taken.get(here.text_hash, [])
        comparable = not spans or tokens[here.text_hash] == here
        if not comparable or any(low < end and first < high for low, high in spans):
            yield index


def _copied(drawn: Spans, runs: set[str], windows: Windows) -> Iterator[int]:
    """``drawn``: texts in which positions decide."""
    by_place = {text.text_hash for text in drawn.texts}
    for index, row in enumerate(windows.evaluation):
        hashes = {windows.places.texts[t].text_hash for t, _, _ in windows.places.spans[index:][:1]}
        if not hashes & by_place and share_known(row, runs) > COPIED:
            yield index


def check_drawn(windows: Windows) -> None:
    """Raise DataError where windows that were just drawn to calibrate on are evaluated too."""
    if windows.origin is None:
        return
    runs = {run for row in windows.calibration for run in chosen_runs(row)}
    found = tuple(sorted(_shared(windows.origin, runs, windows)))
    if found:
        raise _overlap(
            found,
            windows,
            f"the text to calibrate on, {windows.origin.source} ({windows.origin.split})",
            "name other text to calibrate on (--calibration-dataset)",
        )


def check_saved_apart(calibration: Calibration, windows: Windows, model: str) -> None:
    """Raise DataError where the saved graph ``model`` was calibrated on evaluated windows."""
    found = calibrated_windows(calibration, windows)
    if found:
        made = windows.protocol
        stride = "" if made.stride == made.length else f" --stride {made.stride}"
        apart = f"the same text, --windows {made.windows} --length {made.length}{stride}, which "
        apart += "keeps these apart"
        if made.complete:
            apart = "other text to calibrate on (--calibration-dataset)"
        raise _overlap(
            found,
            windows,
            f"what {model} was calibrated on, {calibration_words(calibration)}",
            f"convert again with {apart}, evaluate on other text (--dataset)",
        )


def _overlap(found: tuple[int, ...], windows: Windows, what: str, instead: str) -> DataError:
    listed = ", ".join(str(index + 1) for index in found[:8])
    more = f", ... {found[-1] + 1}" if len(found) > 8 else ""
    return DataError(
        f"{len(found)} of the {len(windows.evaluation)} windows of {windows.protocol.dataset} to "
        f"evaluate (number {listed}{more}) hold {what}: their loss would not be of unseen text; "
        f"{instead}, or give --allow-overlap to score them, which is said beside the figures"
    )
