"""Copied text told by its tokens: hashes of a few runs of each row, chosen by what they hold.

Schleimer et al. 2003, "Winnowing": of every WINDOW runs in a row the one with the least hash is
kept, so that two rows that share SURE tokens in a row keep at least one in common, wherever it
stands in either. A row too short for a run is kept whole, as one hash with its length.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH, WINDOW = 24, 16
SURE = LENGTH + WINDOW - 1
DIGITS = 12
# Fewer tokens than these stand in many a text: they tell only a window that has little else.
FEWEST = 8
# Of a window's runs, those that are known, or of a calibrated row's runs, those in one window.
COPIED = 0.5
_BASE = 6364136223846793005
_MIX = -7046029254386353131


def chosen_runs(row: Tensor) -> list[str]:
    """Hashes (12 hexadecimal digits) of the chosen runs of a row int64 [T]; none below 24."""
    hashes = _hashes(row, LENGTH)
    if not len(hashes):
        return []
    least = hashes.unfold(0, min(WINDOW, len(hashes)), 1).amin(1)
    return [f"{value:0{DIGITS}x}" for value in dict.fromkeys(least.tolist())]


def written_runs(row: Tensor) -> str:
    """The row's chosen runs as a record keeps them, closed by a full stop; of a row of fewer than
    24 tokens its length, a colon and the hash of all of it."""
    if 0 < len(row) < LENGTH:
        return f"{len(row)}:{int(_hashes(row, len(row))):0{DIGITS}x}."
    return "".join(chosen_runs(row)) + "."


@dataclass(frozen=True)
class KnownRuns:
    """What was calibrated on: ``rows`` of each run, ``sizes``: runs of each row; ``short``: hashes
    of whole rows by their length. Records of fxquant 0.1.0 do not tell rows apart: no sizes."""

    rows: dict[int, list[int]]
    sizes: tuple[int, ...]
    short: dict[int, set[int]]

    @classmethod
    def read(cls, written: str) -> KnownRuns:
        """Of the text of ``written_runs`` of each row, one behind the other."""
        apart = "." in written
        rows: dict[int, list[int]] = defaultdict(list)
        short: dict[int, set[int]] = defaultdict(set)
        sizes = []
        for index, row in enumerate(written.removesuffix(".").split(".")):
            length, whole, value = row.partition(":")
            if whole:
                short[int(length)].add(int(value, 16))
            runs = [] if whole else [row[at : at + DIGITS] for at in range(0, len(row), DIGITS)]
            for run in runs:
                rows[int(run, 16)].append(index)
            sizes.append(len(runs))
        return cls(rows, tuple(sizes) if apart else (), short)

    def hold(self, row: Tensor) -> bool:
        """Whether a row int64 [T] is a copy: more than half of its chosen runs are known, or it has
        more than half of those of one calibrated row, or one that was kept whole."""
        mine = chosen_runs(row)
        if sum(int(run, 16) in self.rows for run in mine) > COPIED * len(mine):
            return True
        within = set(_hashes(row, LENGTH).tolist()) if self.sizes else set()
        found = Counter(index for run in within & self.rows.keys() for index in self.rows[run])
        if any(count > COPIED * self.sizes[index] for index, count in found.items()):
            return True
        return any(
            not values.isdisjoint(_hashes(row, length).tolist())
            for length, values in self.short.items()
            if length >= FEWEST or length > COPIED * len(row)
        )


def _hashes(row: Tensor, length: int) -> Tensor:
    """Of all runs of ``length`` tokens, int64 [T - length + 1], none of a shorter row."""
    if len(row) < length:
        return row.new_empty(0)
    powers = torch.empty(length, dtype=torch.int64)
    powers[0] = 1
    for index in range(1, length):
        powers[index] = powers[index - 1] * _BASE  # int64 wraps around
    hashes = ((row.unfold(0, length, 1) + 1) * powers).sum(1) * _MIX
    return (hashes >> 16) & ((1 << 4 * DIGITS) - 1)
