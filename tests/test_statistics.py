"""The paired standard error: by hand, by its definition's limits, and against simulation."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant.errors import DataError
from fxquant.evaluation.statistics import (
    Difference,
    WindowSums,
    mean_sums,
    paired_difference,
    spread,
)


def test_by_hand() -> None:
    # d = (1, 3, 2), n = (1, 2, 1): Δ = 6/4 = 1.5; residuals (-0.5, 0, 0.5): Σ² = 0.5;
    # Var = 3/2 * 0.5 / 16 = 3/64.
    ours = WindowSums((2.0, 5.0, 4.0), (1, 2, 1))
    reference = WindowSums((1.0, 2.0, 2.0), (1, 2, 1))
    found = paired_difference(ours, reference)
    assert found.delta == 1.5
    assert found.error == pytest.approx(math.sqrt(3) / 8)
    assert str(found) == "+1.5000 ± 0.2165"
    assert ours.loss == 11 / 4


SUMS = st.lists(st.floats(-100, 100), min_size=2, max_size=20)


@given(SUMS, st.integers(1, 50))
def test_equal_windows_give_the_standard_error_of_a_mean(values: list[float], tokens: int) -> None:
    count = len(values)
    ours = WindowSums(tuple(values), (tokens,) * count)
    zero = WindowSums((0.0,) * count, (tokens,) * count)
    found = paired_difference(ours, zero)
    means = [value / tokens for value in values]
    expected = statistics.stdev(means) / math.sqrt(count)
    # Cancellation in values up to 100: a few hundred eps.
    assert found.error == pytest.approx(expected, rel=1e-9, abs=1e-11)
    assert found.delta == pytest.approx(statistics.fmean(means), rel=1e-9, abs=1e-11)


@given(SUMS)
def test_what_both_runs_share_cancels(values: list[float]) -> None:
    tokens = tuple(range(1, len(values) + 1))
    # A constant change a token has no error, however different the windows are.
    ours = WindowSums(tuple(v + 0.25 * n for v, n in zip(values, tokens, strict=True)), tokens)
    found = paired_difference(ours, WindowSums(tuple(values), tokens))
    assert found.delta == pytest.approx(0.25, abs=1e-12)
    assert found.error == pytest.approx(0, abs=1e-12)


def test_error_is_the_spread_over_repeated_draws() -> None:
    """Windows of random sizes whose tokens share a window effect: a naive token-level error would
    be several times too small."""
    draw = random.Random(0)
    deltas, errors, naive = [], [], []
    for _ in range(1000):
        sizes = tuple(draw.randint(20, 60) for _ in range(30))
        effects = [draw.gauss(0.1, 0.05) for _ in sizes]
        tokens = [
            [draw.gauss(e, 0.05) for _ in range(n)] for e, n in zip(effects, sizes, strict=True)
        ]
        ours = WindowSums(tuple(math.fsum(window) for window in tokens), sizes)
        found = paired_difference(ours, WindowSums((0.0,) * 30, sizes))
        assert found.error is not None
        deltas.append(found.delta)
        errors.append(found.error)
        flat = [value for window in tokens for value in window]
        naive.append(statistics.stdev(flat) / math.sqrt(len(flat)))
    truth = statistics.stdev(deltas)
    # The spread of 1000 draws is known to 1/sqrt(2000) = 2.2%; the estimate is biased by O(1/30).
    assert statistics.fmean(errors) == pytest.approx(truth, rel=0.08)
    assert statistics.fmean(naive) < truth / 3


def test_one_window_has_no_error() -> None:
    one = WindowSums((2.0,), (7,))
    found = paired_difference(one, WindowSums((1.0,), (7,)))
    assert found == Difference(1 / 7, None)
    assert str(found) == "+0.1429 ± n/a"


def test_other_windows_are_refused() -> None:
    with pytest.raises(DataError, match="same windows: 1 window of 3 scored tokens against 2"):
        paired_difference(WindowSums((1.0,), (3,)), WindowSums((1.0, 2.0), (3, 3)))


def test_seeds() -> None:
    runs = [WindowSums((1.0, 2.0), (3, 3)), WindowSums((3.0, 2.0), (3, 3))]
    assert mean_sums(runs) == WindowSums((2.0, 2.0), (3, 3))
    assert spread([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert spread([1.0]) is None
    with pytest.raises(DataError, match="different windows"):
        mean_sums([runs[0], WindowSums((1.0,), (3,))])
