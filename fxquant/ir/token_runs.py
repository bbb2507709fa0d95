"""Copied text told by its tokens: hashes of a few runs of each row, chosen by what they hold.

Schleimer et al. 2003, "Winnowing": of every WINDOW runs in a row the one with the least hash is
kept, so that two rows that share LENGTH + WINDOW - 1 tokens in a row keep at least one in common,
wherever it stands in either.
"""

from __future__ import annotations

import torch
from torch import Tensor

LENGTH, WINDOW = 24, 16
DIGITS = 12
_BASE = 6364136223846793005
_MIX = -7046029254386353131


def chosen_runs(row: Tensor) -> list[str]:
    """Hashes (12 hexadecimal digits) of the chosen runs of a row int64 [T]; none below 24."""
    if len(row) < LENGTH:
        return []
    powers = torch.empty(LENGTH, dtype=torch.int64)
    powers[0] = 1
    for index in range(1, LENGTH):
        powers[index] = powers[index - 1] * _BASE  # int64 wraps around
    hashes = ((row.unfold(0, LENGTH, 1) + 1) * powers).sum(1) * _MIX
    hashes = (hashes >> 16) & ((1 << 4 * DIGITS) - 1)
    least = hashes.unfold(0, min(WINDOW, len(hashes)), 1).amin(1)
    return [f"{value:0{DIGITS}x}" for value in dict.fromkeys(least.tolist())]


def read_runs(written: str) -> set[str]:
    """The hashes that were written together without gaps."""
    return {written[at : at + DIGITS] for at in range(0, len(written), DIGITS)}


def share_known(row: Tensor, known: set[str]) -> float:
    """Share, 0..1, of the row's chosen runs that are known."""
    mine = chosen_runs(row)
    return sum(each in known for each in mine) / len(mine) if mine else 0.0
