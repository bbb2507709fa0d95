"""Copied text told by its tokens: a run of them in common, compared by one byte a token.

A record keeps, of each row that was read, a byte of the hash of every GRAM tokens in a row (its
marks). n tokens in common are n - 3 marks in common: such a run is always found, wherever it stands
in either row, and a run of n - 1 is taken for one of n with a chance of 2 in 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

GRAM = 4
# Measured with SmolLM2's tokenizer. Of the runs of n tokens in WikiText-2's validation text so many
# occur twice: n = 8 5.2%, 16 0.63%, 32 0.11% (15 places), 64 0.02% (one pair), 96 none. CPython's
# help says whole sections twice (32% at 64), but its two splits have no run of 24 in common.
SURE = 64
# Of rows shorter than twice as long, half counts, but no run below this unless it is all there is.
LEAST = 32
# Fewer tokens than these stand in many a text: nothing is said of them.
FEWEST = 8
_BASE = 6364136223846793005
_MIX = -7046029254386353131


def run_needed(row: int, window: int, same_text: bool = False) -> int:
    """Tokens in a row that make a window of ``window`` tokens a copy of a row of ``row`` tokens.

    64; half of the shorter one where that has fewer than 128, but at least 32, or all of it. In one
    text, where positions are compared first, half of the shorter one: less than that a text may say
    twice by itself, and of a row that is cut in two, one window has half.
    """
    shorter = min(row, window)
    half = max(LEAST, (shorter + 1) // 2)
    return min(shorter, half if same_text else min(SURE, half))


def written_runs(row: Tensor) -> str:
    """The marks of a row int64 [T] as a record keeps them: two hexadecimal digits each, closed by a
    full stop."""
    return bytes(_marks(row).tolist()).hex() + "."


@dataclass(frozen=True)
class KnownRuns:
    """The marks int64 [T - 3] of each row that was calibrated on; None where a record has none that
    can be compared (fxquant 0.1.0)."""

    rows: tuple[Tensor, ...] | None
    _hashed: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, written: str) -> KnownRuns:
        """Of the text of ``written_runs`` of each row, one behind the other.

        Raises ValueError for what is none.
        """
        if not written.endswith("."):
            bytes.fromhex(written)
            return cls(None)
        rows = (bytes.fromhex(each) for each in written[:-1].split("."))
        return cls(tuple(torch.tensor(list(row), dtype=torch.int64) for row in rows))

    def tell(self, rows: Sequence[Tensor]) -> bool:
        """Whether all that rows int64 [T] have in common with these is found: not where one of
        either is too short, or one of these repeats itself."""
        if self.rows is None or any(len(row) < FEWEST for row in rows):
            return False
        return all(
            len(marks) + GRAM > FEWEST
            and 2 * len(marks.unique()) >= min(len(marks), SURE - GRAM + 1)
            for marks in self.rows
        )

    def hold(self, row: Tensor, same_text: bool = False) -> bool:
        """Whether a row int64 [T] is a copy: it has ``run_needed`` tokens in a row in common with
        one of these rows, at least half of whose grams differ (rulers and tables do not count).

        ``same_text``: both are of one text, in which positions were compared.
        """
        if self.rows is None or len(row) < FEWEST:
            return False
        grams = _hashes(row, GRAM)
        marks = grams & 255
        lengths = {len(each) for each in self.rows if len(each) + GRAM > FEWEST}
        return any(
            self._found(grams, marks, length, needed - GRAM + 1)
            for length in lengths
            for needed in [run_needed(length + GRAM - 1, len(row), same_text)]
            if not same_text or needed >= LEAST
        )

    def _found(self, grams: Tensor, marks: Tensor, length: int, needed: int) -> bool:
        """Whether ``needed`` marks in a row are those of a row of ``length`` marks."""
        mine = _hashes(marks, needed)
        starts = torch.isin(mine, self._runs(length, needed)).nonzero()[:, 0]
        if not len(starts):
            return False
        runs = grams.unfold(0, needed, 1)[starts].sort(1).values
        different = (runs[:, 1:] != runs[:, :-1]).sum(1) + 1
        return bool((2 * different >= needed).any())

    def _runs(self, length: int, needed: int) -> Tensor:
        """Hashes of all runs of ``needed`` marks in the rows of ``length`` marks."""
        key = (length, needed)
        if key not in self._hashed:
            rows = [each for each in self.rows or () if len(each) == length]
            self._hashed[key] = torch.cat([_hashes(each, needed) for each in rows]).unique()
        return self._hashed[key]


def _marks(row: Tensor) -> Tensor:
    return _hashes(row, GRAM) & 255


def _hashes(row: Tensor, length: int) -> Tensor:
    """Of all runs of ``length`` values, int64 [T - length + 1], none of a shorter row."""
    if len(row) < length:
        return row.new_empty(0)
    powers = torch.full((length,), _BASE).cumprod(0)  # int64 wraps around
    hashes = ((row.unfold(0, length, 1) + 1) * powers).sum(1) * _MIX
    return (hashes >> 16) & ((1 << 48) - 1)
