"""Evaluation windows that hold what a graph was calibrated on: their loss is not of unseen text."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from fxquant.errors import DataError
from fxquant.evaluation.datasets import NAMED
from fxquant.ir.calibrated_rows import can_tell, seen_rows, shared_rows
from fxquant.ir.calibration import Calibration, calibration_words
from fxquant.ir.counted import part_of
from fxquant.ir.token_runs import written_runs

if TYPE_CHECKING:
    from fxquant.evaluation.token_windows import Windows


def calibrated_windows(calibration: Calibration, windows: Windows) -> tuple[int, ...]:
    """Indices of the evaluation windows that hold what the calibration read: see ``seen_rows``.

    Between two named datasets, whose protocols are the papers', only the same text counts.
    """
    return seen_rows(
        calibration, tuple(windows.evaluation), windows.places, _decided_by_place(windows)
    )


def overlap_of(calibration: Calibration, windows: Windows) -> tuple[int, ...] | None:
    """``calibrated_windows``; None for none where not all of them could be told."""
    found = calibrated_windows(calibration, windows)
    told = can_tell(
        calibration, tuple(windows.evaluation), windows.places, _decided_by_place(windows)
    )
    return found if found or told else None


def _decided_by_place(windows: Windows) -> Collection[str]:
    return NAMED if windows.protocol.dataset in NAMED else ()


def check_drawn(windows: Windows) -> None:
    """Raise DataError where windows that were just drawn to calibrate on are evaluated too."""
    if windows.origin is None:
        return
    runs = "".join(map(written_runs, windows.calibration))
    rows, by_place = tuple(windows.evaluation), _decided_by_place(windows)
    found = tuple(sorted(shared_rows(windows.origin, runs, rows, windows.places, by_place)))
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
    where = f"of {windows.protocol.dataset} to evaluate (number {listed}{more})"
    nouns = f"window {where}", f"windows {where}"
    return DataError(
        f"{part_of(len(found), len(windows.evaluation), *nouns)} {what}: "
        f"{'its' if len(found) == 1 else 'their'} loss would not be of unseen text; "
        f"{instead}, or give --allow-overlap to score them, which is said beside the figures"
    )
