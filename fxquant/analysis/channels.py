"""Which input channels and which tokens carry a site's error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.analysis.local import LocalFigures
from fxquant.analysis.parts import CAUSES
from fxquant.analysis.path import PathSite

Decode = Callable[[int], str]
_WORST = 4  # that are named of a site


@dataclass(frozen=True)
class Channel:
    """One input channel of a site.

    ``share`` of the error's energy that stands in it; ``blame``: the same, but rounding's energy
    given to the channels that stretch the range (local.stretch); largest |x|, and that over the
    median channel's; its part of ``path`` in nats (None where path does not count).
    """

    channel: int
    share: float
    blame: float
    peak: float
    peak_over_median: float
    effect: float | None


@dataclass(frozen=True)
class Token:
    """One position of a window: token id, text (None without a tokenizer), class.

    ``share``, ``blame`` and ``effect`` as for channels.
    """

    window: int
    row: int
    position: int
    token_id: int
    text: str | None
    group: str
    share: float
    blame: float
    effect: float | None


def worst_channels(figures: LocalFigures, path: PathSite | None) -> tuple[Channel, ...]:
    """The input channels with most blame for the error's energy, of all parts together."""
    if figures.peaks is None or figures.blame is None:
        return ()
    energy = torch.stack([figures.channels[c] for c in CAUSES if c in figures.channels]).sum(0)
    total, blamed = float(energy.sum()) or 1.0, float(figures.blame.sum()) or 1.0
    median = float(figures.peaks.to(torch.float32).median()) or 1.0
    effects = None if path is None else path.channels
    return tuple(
        Channel(
            channel=index,
            share=float(energy[index]) / total,
            blame=float(figures.blame[index]) / blamed,
            peak=float(figures.peaks[index]),
            peak_over_median=float(figures.peaks[index]) / median,
            effect=None if effects is None else float(effects[index]),
        )
        for index in figures.blame.topk(min(_WORST, energy.numel())).indices.tolist()
    )


def worst_tokens(
    figures: LocalFigures,
    path: PathSite | None,
    windows: Sequence[Tensor],
    decode: Decode | None,
) -> tuple[Token, ...]:
    """The tokens with most blame for the error's energy."""
    total, blamed = (
        sum(float(window.sum()) for window in windows_of) or 1.0
        for windows_of in (figures.tokens, figures.token_blame)
    )
    candidates: list[tuple[float, int, int]] = []
    for window, energy in enumerate(figures.token_blame):
        best = energy.topk(min(_WORST, energy.numel()))
        candidates += [
            (float(value), window, int(index))
            for value, index in zip(best.values, best.indices, strict=True)
        ]
    candidates.sort(key=lambda c: (-c[0], c[1], c[2]))
    found = []
    for blame, window, index in candidates[:_WORST]:
        ids = windows[window]
        row, position = divmod(index, ids.shape[1])
        token = int(ids[row, position])
        effect = None if path is None else float(path.tokens[window][index])
        text = None if decode is None else decode(token)
        group = token_group(position, text)
        share = float(figures.tokens[window][index]) / total
        found.append(
            Token(window, row, position, token, text, group, share, blame / blamed, effect)
        )
    return tuple(found)


def token_group(position: int, text: str | None) -> str:
    """ "first", "delimiter" (no letter or digit in its text), or "rest"."""
    if position == 0:
        return "first"
    if text is not None and not any(character.isalnum() for character in text):
        return "delimiter"
    return "rest"


def group_shares(
    figures: LocalFigures, windows: Sequence[Tensor], decode: Decode | None
) -> dict[str, float]:
    """Share of the error's energy at first tokens, delimiters and the rest."""
    names = ("first", "rest") if decode is None else ("first", "delimiter", "rest")
    shares = dict.fromkeys(names, 0.0)
    known: dict[int, str] = {}
    for ids, energy in zip(windows, figures.tokens, strict=True):
        for token in set(ids.unique().tolist()) - known.keys() if decode else ():
            assert decode is not None
            known[token] = token_group(1, decode(token))
        for row, values in zip(ids.tolist(), energy.view(ids.shape).tolist(), strict=True):
            shares["first"] += values[0]
            for token, value in zip(row[1:], values[1:], strict=True):
                shares[known.get(token, "rest")] += value
    total = sum(shares.values()) or 1.0
    return {name: value / total for name, value in shares.items()}
