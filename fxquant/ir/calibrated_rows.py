"""Rows of tokens that hold what a graph was calibrated on: their loss is not of unseen text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from fxquant.ir.calibration import Calibration, Origin, Spans
from fxquant.ir.token_runs import KnownRuns

NOWHERE = Spans()


def seen_rows(
    calibration: Calibration,
    rows: Sequence[Tensor],
    places: Spans = NOWHERE,
    by_place: Collection[str] = (),
) -> tuple[int, ...]:
    """Indices of the rows int64 [T] that hold what the calibration read.

    ``places``: where the rows lie in a text, if that is known. In the same text, whatever it is
    called, by position: one token is enough, and where two tokenizers do not agree on it the whole
    text counts. Copies, and rows or batches that came without a text, are told by runs of tokens
    (``KnownRuns.hold``), but for calibration texts named in ``by_place``.
    """
    found = (
        shared_rows(each.origin, each.runs, rows, places, by_place) for each in calibration or ()
    )
    return tuple(sorted(set().union(*found)))


def shared_rows(
    origin: Origin | None,
    runs: str,
    rows: Sequence[Tensor],
    places: Spans = NOWHERE,
    by_place: Collection[str] = (),
) -> set[int]:
    """``seen_rows`` of what was drawn as ``origin`` says and has these ``runs``, as written."""
    drawn = NOWHERE if origin is None else origin.spans
    found = set(_same_text(drawn, places))
    if origin is None or origin.source not in by_place:
        found |= set(_copied(drawn, KnownRuns.read(runs), rows, places))
    return found


def can_tell(
    calibration: Calibration,
    rows: Sequence[Tensor],
    places: Spans = NOWHERE,
    by_place: Collection[str] = (),
) -> bool:
    """Whether all that the rows share with the calibration is found: not where nothing says what it
    read, nor, without a common text, where runs cannot tell (``KnownRuns.tell``)."""
    if calibration is None:
        return False
    texts = {text.text_hash for text in places.texts}
    for each in calibration:
        drawn = NOWHERE if each.origin is None else each.origin.spans
        if texts and texts <= {text.text_hash for text in drawn.texts}:
            continue
        if each.origin is not None and each.origin.source in by_place:
            continue
        if not KnownRuns.read(each.runs).tell(rows):
            return False
    return True


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


def _copied(drawn: Spans, known: KnownRuns, rows: Sequence[Tensor], places: Spans) -> Iterator[int]:
    """``drawn``: texts in which positions decide first."""
    decided = {text.text_hash for text in drawn.texts}
    for index, row in enumerate(rows):
        hashes = {places.texts[text].text_hash for text, _, _ in places.spans[index:][:1]}
        if known.hold(row, same_text=bool(hashes & decided)):
            yield index
