"""Range estimators: histograms against the raw samples they were made from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.formats.grid import Grid
from fxquant.formats.integer import integer
from fxquant.formats.table import GRIDS
from fxquant.numerics.observers import HistogramObserver
from fxquant.numerics.quantization import (
    activation_qparams_from_range,
    calc_qparams_symmetric,
    dequantize,
    encode,
)
from fxquant.numerics.ranges import distribution, estimate_range
from fxquant.schemes.specs import Estimator, EstimatorKind, TensorSpec

SEEDS = st.integers(0, 2**32 - 1)
# A bin holds the floats that share sign, exponent and 7 bits of the mantissa.
BIN_WIDTH = 1 / 128
SHAPES = ("normal", "laplace", "relu", "shifted", "skewed", "outliers", "positive", "negative")
KINDS: tuple[EstimatorKind, ...] = ("absmax", "percentile", "mse", "entropy")


def samples(shape: str, seed: int, count: int = 6000) -> Tensor:
    torch.manual_seed(seed)
    x = torch.randn(count)
    if shape == "laplace":
        return x.sign() * torch.empty(count).exponential_()
    if shape == "outliers":
        x[:3] = torch.tensor([60.0, -40.0, 50.0])
    return {
        "relu": x.relu(),
        "shifted": x + 1.5,
        "skewed": x.exp() - 1,
        "positive": x.abs() + 3,
        "negative": -x.abs() - 3,
    }.get(shape, x)


def observed(x: Tensor) -> HistogramObserver:
    observer = HistogramObserver("layers.0.fc1")
    observer(x.reshape(1, -1, 1), torch.ones(1, x.numel()))
    return observer


def spec(bits: int, symmetric: bool) -> TensorSpec:
    return TensorSpec(integer(bits, symmetric), "tensor")


def estimator(kind: EstimatorKind, percent: float = 99.9) -> Estimator:
    return Estimator(kind, percent if kind == "percentile" else None)


def squared_error(x: Tensor, low: float, high: float, tensor: TensorSpec) -> float:
    """The mean squared error on the raw samples, by numpy in float64."""
    qmin, qmax = tensor.grid.codes
    if not tensor.grid.has_zero_point:
        scale, zero_point = high / qmax, 0.0
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / (qmax - qmin)
        zero_point = np.clip(np.rint(qmin - low / scale), qmin, qmax)
    values = x.double().numpy()
    codes = np.clip(np.rint(values / scale) + zero_point, qmin, qmax)
    return float((((codes - zero_point) * scale - values) ** 2).mean())


# --- the distribution -----------------------------------------------------------------------------


@given(seed=SEEDS, shape=st.sampled_from(SHAPES), magnitude=st.booleans())
@settings(deadline=None, max_examples=15)
def test_distribution_bins_hold_the_samples(seed: int, shape: str, magnitude: bool) -> None:
    x = samples(shape, seed, 500)
    seen = distribution(observed(x))
    values = np.sort(x.double().numpy())
    if magnitude:
        seen, values = seen.magnitude(), np.sort(np.abs(values))
    assert seen.total == len(values)
    assert (seen.upper >= seen.lower).all()
    # Each sample, in order, lies in the bin that holds its rank.
    owner = np.repeat(np.arange(len(seen.counts)), seen.counts.long().numpy())
    assert (values >= seen.lower.numpy()[owner]).all()
    assert (values <= seen.upper.numpy()[owner]).all()
    assert (seen.upper[:-1] <= seen.lower[1:]).all()
    if magnitude:
        assert float(seen.upper[-1]) == values[-1]
        return  # the near edges are those of the bins
    assert (float(seen.lower[0]), float(seen.upper[-1])) == (values[0], values[-1])
    width = (seen.upper - seen.lower).numpy()
    assert (
        width <= np.abs(values[np.searchsorted(owner, range(len(width)))]) * BIN_WIDTH + 2**-126
    ).all()


def test_nothing_seen() -> None:
    for kind in KINDS:
        with pytest.raises(CalibrationError, match=r"layers\.0\.fc1: calibration saw no token"):
            estimate_range(HistogramObserver("layers.0.fc1"), estimator(kind), spec(8, True))


# --- absmax ---------------------------------------------------------------------------------------


@given(seed=SEEDS, shape=st.sampled_from(SHAPES))
@settings(deadline=None, max_examples=15)
def test_absmax_is_exact(seed: int, shape: str) -> None:
    x = samples(shape, seed, 300)
    low, high = estimate_range(observed(x), Estimator("absmax"), spec(8, False))
    assert (low, high) == (x.min().item(), x.max().item())
    largest = x.abs().max().item()
    assert estimate_range(observed(x), Estimator("absmax"), spec(8, True)) == (-largest, largest)


# --- percentiles ----------------------------------------------------------------------------------


def neighbours(values: np.ndarray, share: float) -> tuple[float, float]:
    """The samples just below and above the quantile's rank, widened by a bin's relative width.

    One rank either way: share * count may round to another side of an integer.
    """
    rank = math.ceil(share * len(values))
    around = np.sort(values)[max(rank - 2, 0) : rank + 1]
    slack = np.abs(around) * BIN_WIDTH
    return float((around - slack).min()), float((around + slack).max())


@given(
    seed=SEEDS,
    shape=st.sampled_from(SHAPES),
    percent=st.one_of(st.sampled_from([99.0, 99.9, 99.99, 100.0]), st.floats(50.5, 100)),
    count=st.integers(1, 3000),
)
@settings(deadline=None, max_examples=40)
def test_percentiles_lie_within_a_bin(seed: int, shape: str, percent: float, count: int) -> None:
    x = samples(shape, seed, max(count, 3))
    values = x.double().numpy()
    observer = observed(x)
    low, high = estimate_range(observer, Estimator("percentile", percent), spec(8, True))
    assert low == -high
    smallest, largest = neighbours(np.abs(values), percent / 100)
    # Zeros share their bin with subnormal numbers.
    assert smallest - 2**-126 <= high <= largest + 2**-126

    low, high = estimate_range(observer, Estimator("percentile", percent), spec(8, False))
    outside = (1 - percent / 100) / 2
    for end, share in ((low, outside), (high, 1 - outside)):
        smallest, largest = neighbours(values, share)
        assert smallest - 2**-126 <= end <= largest + 2**-126
    assert x.min().item() <= low <= high <= x.max().item()


@pytest.mark.parametrize("shape", ["normal", "laplace", "shifted", "positive"])
@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
def test_percentiles_agree_with_torch_quantile(shape: str, percent: float) -> None:
    x = samples(shape, torch.initial_seed(), 50000)
    share = percent / 100
    _, high = estimate_range(observed(x), Estimator("percentile", percent), spec(8, True))
    # torch interpolates between two samples; at rank 49950 of 50000 they are closer than a bin.
    wanted = torch.quantile(x.abs().double(), share, interpolation="higher").item()
    gap = wanted - torch.quantile(x.abs().double(), share - 2 / 50000).item()
    assert abs(high - wanted) <= wanted * BIN_WIDTH + 2 * gap


@pytest.mark.parametrize("shape", ["normal", "laplace", "shifted", "skewed"])
@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
def test_both_percentiles_clip_the_same_share(shape: str, percent: float) -> None:
    x = samples(shape, torch.initial_seed(), 40000)
    clipped = []
    for symmetric in (True, False):
        low, high = estimate_range(
            observed(x), Estimator("percentile", percent), spec(8, symmetric)
        )
        clipped.append(((x < low) | (x > high)).double().mean().item())
    # Inside the bin of the quantile the position is interpolated: at worst, for each end, that
    # bin's own share is off. Densities here put at most 0.8% of the samples in a bin.
    for share in clipped:
        assert abs(share - (1 - percent / 100)) <= (1 - percent / 100) * 0.1 + 4 / 40000


def test_percentile_100_is_absmax() -> None:
    x = samples("shifted", torch.initial_seed())
    alike = x.clone()
    alike[:2] = torch.tensor([-10.05, 10.01])  # of magnitudes in one bin, the larger one negative
    for seen in (observed(x), observed(alike)):
        for symmetric in (True, False):
            wanted = estimate_range(seen, Estimator("absmax"), spec(8, symmetric))
            found = estimate_range(seen, Estimator("percentile", 100), spec(8, symmetric))
            assert found == wanted


def test_a_larger_percentile_of_both_signs_is_no_smaller() -> None:
    seen = observed(samples("normal", torch.initial_seed(), 20000))
    percents = [Estimator("percentile", 90 + step / 30) for step in range(301)]
    highs = [estimate_range(seen, each, spec(8, True))[1] for each in percents]
    assert highs == sorted(highs)


# --- least squared error --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_symmetric_mse_is_near_the_best_of_a_search(shape: str, bits: int) -> None:
    x, tensor = samples(shape, torch.initial_seed()), spec(bits, True)
    low, high = estimate_range(observed(x), Estimator("mse"), tensor)
    assert low == -high
    found = squared_error(x, low, high, tensor)
    largest = x.abs().max().item()
    best = min(squared_error(x, -t, t, tensor) for t in np.linspace(largest / 100, largest, 100))
    # At 8 bits a bin is as wide as a step, so the estimator sees positions inside a step as
    # uniform. The squares of 6000 uniform positions have a mean that is off by 0.9 / sqrt(6000) =
    # 1.2%, for both sides of a comparison: 5% is three deviations.
    assert found <= best * 1.05
    assert found <= squared_error(x, -largest, largest, tensor) * 1.05


@pytest.mark.parametrize("shape", ["normal", "relu", "shifted", "skewed", "outliers", "positive"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_affine_mse_is_near_the_best_of_a_search(shape: str, bits: int) -> None:
    x, tensor = samples(shape, torch.initial_seed()), spec(bits, False)
    low, high = estimate_range(observed(x), Estimator("mse"), tensor)
    found = squared_error(x, low, high, tensor)
    bottom, top = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    grid = np.linspace(1 / 24, 1, 24)
    best = min(
        squared_error(x, a * bottom, b * top, tensor)
        for b in grid
        for a in (grid if bottom < 0 else [1.0])
    )
    # As above, and the ends are searched one after another, not on a grid of both.
    assert found <= best * 1.08
    assert found <= squared_error(x, bottom, top, tensor) * 1.05


def test_mse_clips_outliers_at_low_precision_and_keeps_them_at_high() -> None:
    x = samples("outliers", torch.initial_seed(), 60000)
    # At 3 bits the step of absmax, 20, drowns everything else; at 8 bits it is 0.47, and to
    # clip all three costs more: 50**2 * 3 / 60000 = 0.12 against 0.47**2 / 12 = 0.018.
    assert estimate_range(observed(x), Estimator("mse"), spec(3, True))[1] < 10
    assert estimate_range(observed(x), Estimator("mse"), spec(8, True))[1] > 40


# --- entropy --------------------------------------------------------------------------------------


@given(seed=SEEDS, shape=st.sampled_from(SHAPES[:6]), symmetric=st.booleans())
@settings(deadline=None, max_examples=6)
def test_entropy_ranges_are_shrunk_absmax_ranges(seed: int, shape: str, symmetric: bool) -> None:
    x = samples(shape, seed, 2000)
    full = estimate_range(observed(x), Estimator("absmax"), spec(8, symmetric))
    low, high = estimate_range(observed(x), Estimator("entropy"), spec(8, symmetric))
    # At least one histogram bin of 2048 a level.
    smallest = (2**7 if symmetric else 2**8) / 2048
    assert smallest <= high / full[1] <= 1
    if full[0]:
        assert low / full[0] == pytest.approx(high / full[1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_entropy_clips_a_far_outlier(symmetric: bool, bits: int) -> None:
    x = samples("normal", torch.initial_seed(), 20000)
    kept = estimate_range(observed(x), Estimator("entropy"), spec(bits, symmetric))
    x[0], x[1] = 40.0, -40.0
    low, high = estimate_range(observed(x), Estimator("entropy"), spec(bits, symmetric))
    # One sample of 20000 at ten times the rest moves the range less than twofold.
    assert high < 10 < 40
    assert low > -10
    assert kept[1] > 1.5


def test_entropy_keeps_what_needs_no_clipping() -> None:
    # Uniform: every level inside is used alike, so clipping can only lose.
    x = torch.rand(50000, generator=torch.Generator().manual_seed(torch.initial_seed())) * 2 - 1
    for symmetric in (True, False):
        _, high = estimate_range(observed(x), Estimator("entropy"), spec(8, symmetric))
        assert high > 0.97


@pytest.mark.parametrize("symmetric", [True, False])
def test_exact_zeros_do_not_move_entropy_ranges(symmetric: bool) -> None:
    # They have a code of their own and cost nothing, however many there are (post-ReLU inputs).
    x, tensor = samples("normal", torch.initial_seed()), spec(8, symmetric)
    many = torch.cat((x, torch.zeros(20000)))
    wanted = estimate_range(observed(x), Estimator("entropy"), tensor)
    assert estimate_range(observed(many), Estimator("entropy"), tensor) == wanted


def test_entropy_counts_what_it_clips() -> None:
    # The candidate range [-3, 3] holds one sample: clipped to its end, 5000 others look the same.
    x = torch.cat((torch.tensor([2.999]), torch.linspace(3.001, 8, 5000)))
    low, high = estimate_range(observed(x), Estimator("entropy"), spec(8, True))
    assert low == -high
    assert (x <= high).double().mean() > 0.9


@pytest.mark.parametrize("shape", ["positive", "negative"])
def test_affine_entropy_of_a_range_without_zero(shape: str) -> None:
    x = samples(shape, torch.initial_seed())
    low, high = estimate_range(observed(x), Estimator("entropy"), spec(8, False))
    # At least 256 of 2048 bins stay, and most samples lie inside.
    assert min(x.min().item(), 0) <= low < high <= max(x.max().item(), 0)
    assert ((x >= low) & (x <= high)).double().mean() > 0.9


# --- other grids ----------------------------------------------------------------------------------

OTHERS = ("e4m3", "e2m1", "e3m2", "nf4")


def on_numbers(x: Tensor, end: float, grid: Grid) -> Tensor:
    """float64 x on the numbers of the grid, whose end stands at ``end``."""
    numbers = torch.tensor(grid.levels, dtype=torch.float64) / grid.reach * end
    return numbers[(x[:, None] - numbers).abs().argmin(-1)]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("shape", ["normal", "laplace"])
def test_mse_searches_on_the_grids_own_numbers(name: str, shape: str) -> None:
    x, grid = samples(shape, torch.initial_seed(), 4000).double(), GRIDS[name]
    low, high = estimate_range(observed(x.float()), Estimator("mse"), TensorSpec(grid, "tensor"))
    assert low == -high
    tried = torch.linspace(0.02, 1, 120).double() * x.abs().max()
    errors = [float((on_numbers(x, float(end), grid) - x).square().sum()) for end in tried]
    # A bin of the histogram is 2^-7 of its value wide.
    assert float((on_numbers(x, high, grid) - x).square().sum()) < 1.1 * min(errors)


def plain_divergence(x: Tensor, end: float, most: float, grid: Grid) -> float:
    """KL of the counts in even bins, clipped to ``end``, against those spread over each number."""
    width = 2 * most / 2048
    inside = x.clamp(-end + width / 2, end - width / 2)
    bins = ((inside + most) / width).long()
    counts = torch.bincount(bins, minlength=2048).double()
    kept = torch.bincount(((x[x.abs() < end] + most) / width).long(), minlength=2048).double()
    numbers = on_numbers((torch.arange(2048) + 0.5) * width - most, end, grid)
    spread = torch.zeros(2048, dtype=torch.float64)
    for number in numbers.unique():
        own = (numbers == number) & (kept > 0)
        spread[own] = kept[own].mean()
    p, q, used = counts / len(x), spread / len(x), counts > 0
    return float((p[used] * (p[used] / q[used].clamp(min=1e-12)).log()).sum() + q.sum() - 1)


@pytest.mark.parametrize("name", OTHERS)
def test_entropy_searches_on_the_grids_own_numbers(name: str) -> None:
    x, grid = samples("normal", torch.initial_seed(), 20000).double(), GRIDS[name]
    x[0] = 12.0
    tensor = TensorSpec(grid, "tensor")
    low, high = estimate_range(observed(x.float()), Estimator("entropy"), tensor)
    assert low == -high
    least = min(
        plain_divergence(x, end, 12.0, grid) for end in torch.linspace(1.5, 12, 60).tolist()
    )
    found = plain_divergence(x, high, 12.0, grid)
    # 4 points stand for each bin of the histogram, so counts at edges of the even bins move.
    assert found < 1.2 * least + 0.02
    if name == "e2m1":  # three of its seven magnitudes are above half of its end, unlike int4's
        _, even = estimate_range(observed(x.float()), Estimator("entropy"), spec(4, True))
        assert high != even


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["mse", "entropy"])
def test_a_constant_lies_on_a_number(name: str, kind: EstimatorKind) -> None:
    x = torch.full((50,), 2.75)
    tensor = TensorSpec(GRIDS[name], "tensor")
    _, high = estimate_range(observed(x), Estimator(kind), tensor)
    found = on_numbers(x.double(), high, GRIDS[name])
    torch.testing.assert_close(found, x.double(), rtol=2**-6, atol=0)


# --- degenerate inputs ----------------------------------------------------------------------------


def round_trip(x: Tensor, low: float, high: float, tensor: TensorSpec) -> Tensor:
    qmin, qmax = tensor.grid.codes
    scale, shift = calc_qparams_symmetric(torch.tensor(high), qmax), None
    if tensor.grid.has_zero_point:
        scale, shift = activation_qparams_from_range(
            torch.tensor(low), torch.tensor(high), qmin, qmax
        )
    return dequantize(encode(x, scale, shift, qmin, qmax), scale, shift)


@pytest.mark.parametrize("value", [2.75, -2.75, 1e-20, 3e30, 0.0])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_constant_inputs(kind: EstimatorKind, symmetric: bool, value: float) -> None:
    x, tensor = torch.full((50,), value), spec(8, symmetric)
    low, high = estimate_range(observed(x), estimator(kind), tensor)
    # The range ends at the constant (or a threshold on which it falls), so it has an exact code:
    # one division, one product, and the float64 to float32 of the end.
    torch.testing.assert_close(round_trip(x, low, high, tensor), x, rtol=2**-21, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_relu_outputs_spend_no_affine_code_below_zero(kind: EstimatorKind) -> None:
    x, tensor = samples("relu", torch.initial_seed()), spec(8, False)
    low, high = estimate_range(observed(x), estimator(kind), tensor)
    assert 0 <= low < 2**-126
    assert 0 < high <= x.max().item()
    _, zero_point = activation_qparams_from_range(torch.tensor(low), torch.tensor(high), -128, 127)
    assert int(zero_point) == -128
    zeros = round_trip(x, low, high, tensor)[x == 0]
    assert len(zeros) > 2000
    assert (zeros == 0).all()


def test_mostly_zeros_have_a_small_symmetric_percentile() -> None:
    # What a percentile that counts zeros does to sparse inputs: everything else is clipped.
    x = torch.zeros(10000)
    x[:5] = torch.arange(1, 6)
    _, high = estimate_range(observed(x), Estimator("percentile", 99.9), spec(8, True))
    assert 0 <= high < 2**-126


# --- the share outside ----------------------------------------------------------------------------


@given(seed=SEEDS, shape=st.sampled_from(SHAPES), cut=st.floats(0.01, 1.2))
@settings(deadline=None, max_examples=20)
def test_share_outside_against_a_plain_count(seed: int, shape: str, cut: float) -> None:
    x = samples(shape, seed, 1000)
    low, high = cut * min(x.min().item(), 0), cut * max(x.max().item(), 0)
    found = distribution(observed(x)).share_outside(low, high)

    def count(widen: float) -> float:
        return ((x < low * widen) | (x > high * widen)).double().mean().item()

    # Of a bin that straddles an end a part counts as outside.
    assert count(1 + 2 * BIN_WIDTH) <= found <= count(1 - 2 * BIN_WIDTH)


def test_share_outside_is_exact_between_bins() -> None:
    x = torch.tensor([-8.0, -2.0, -1.0, 0.0, 0.5, 1.0, 3.0, 3.0, 16.0, 100.0])
    seen = distribution(observed(x))
    assert seen.share_outside(-4.0, 4.0) == pytest.approx(0.3, rel=1e-12)
    assert seen.share_outside(-100.0, 100.0) == 0
    assert seen.share_outside(-1.5, 0.75) == pytest.approx(0.7, rel=1e-12)
