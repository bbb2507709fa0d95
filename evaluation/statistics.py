"""Is a change of loss larger than chance? Standard errors by paired differences over windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fxquant.errors import DataError
from fxquant.ir.counted import counted
from fxquant.run.loss import standard_error


@dataclass(frozen=True)
class WindowSums:
    """A run's negative log likelihood (nats), summed in float64 over each window's scored tokens.

    ``nll`` and ``tokens`` have one entry a window, in the windows' order.
    """

    nll: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def loss(self) -> float:
        """Mean over all scored tokens."""
        return math.fsum(self.nll) / sum(self.tokens)


@dataclass(frozen=True)
class Difference:
    """Δloss in nats a token, and its standard error; None where one window leaves it undefined."""

    delta: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.delta:+.4f} ± {'n/a' if self.error is None else format(self.error, '.4f')}"


def paired_difference(ours: WindowSums, reference: WindowSums) -> Difference:
    """Δloss of two runs over the same windows, and its standard error.

    Windows w = 1..N are clusters of n_w scored tokens; d_w is the difference of a window's two
    sums. Δ = Σ d_w / Σ n_w is a ratio estimator, and by linearization (Cochran 1977, eq. 6.13)

        Var(Δ) = N / (N - 1) · Σ (d_w - Δ n_w)² / (Σ n_w)²

    With windows of one size this is s²/N of the windows' mean differences. Pairing cancels how hard
    each window is, which both runs share; tokens of one window may depend on each other in any way.
    Windows count as independent draws from the text: neighbours that share a document make the
    true error somewhat larger. With one window the error is undefined (None).

    Raises DataError when the runs do not have the same windows.
    """
    if ours.tokens != reference.tokens:
        raise DataError(
            f"paired differences need the same windows: {counted(len(ours.tokens), 'window')} of "
            f"{counted(sum(ours.tokens), 'scored token')} against {len(reference.tokens)} of "
            f"{sum(reference.tokens)}"
        )
    differences = [a - b for a, b in zip(ours.nll, reference.nll, strict=True)]
    delta = math.fsum(differences) / sum(ours.tokens)
    return Difference(delta, standard_error(differences, ours.tokens))


def mean_sums(runs: Sequence[WindowSums]) -> WindowSums:
    """The mean over runs (seeds) of each window's sum; all have the same windows."""
    if any(run.tokens != runs[0].tokens for run in runs):
        raise DataError("runs over different windows have no mean")
    columns = zip(*(run.nll for run in runs), strict=True)
    return WindowSums(tuple(math.fsum(c) / len(runs) for c in columns), runs[0].tokens)


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds (n - 1 in the denominator); None for fewer than two."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
