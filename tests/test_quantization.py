"""Scales, zero points, codes and error measures, against numpy, torch.ao and plain Python."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import NonFiniteError, SchemeError
from fxquant.formats.integer import integer
from fxquant.formats.scales import MIN_SCALE
from fxquant.numerics.quantization import (
    activation_qparams_from_range,
    calc_qparams_symmetric,
    check_finite,
    choose_qparams,
    dequantize,
    encode,
    expand_groups,
    group_count,
    group_ranges,
    rounded_codes,
)
from tests.reference import sqnr_db

SEEDS = st.integers(0, 2**32 - 1)
BITS = st.integers(2, 8)
FLOAT32 = st.floats(allow_nan=False, allow_infinity=False, width=32)
GRANULARITIES = ("tensor", "channel", "token", "group")


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values whose rows differ in size and centre."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    size = torch.rand(*shape[:-1], 1, generator=generator) * 10 + 0.1
    return (x * size + torch.randn(*shape[:-1], 1, generator=generator)).to(dtype)


def spread(values: Tensor, length: int, group_size: int) -> np.ndarray:
    """Per-group values [N, G] repeated over [N, length], column by column."""
    columns = [values.numpy()[..., k // group_size] for k in range(length)]
    return np.stack(columns, axis=-1)


def unclamped(x: Tensor, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    """round(x / scale) + zero_point by numpy, whose rint also sends ties to even."""
    quotient = x.to(torch.float32).numpy() / scale.astype(np.float32)
    return np.rint(quotient).astype(np.int64) + zero_point.astype(np.int64)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_range(bits: int) -> None:
    codes = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    assert integer(bits, symmetric=False).codes == (codes[0], codes[-1])
    assert integer(bits, symmetric=True).codes == (codes[1], codes[-1])


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_integer_range_refuses(bits: int) -> None:
    with pytest.raises(SchemeError, match=r"bits must be 2\.\.8"):
        integer(bits)


# --- codes ----------------------------------------------------------------------------------------


@given(
    seed=SEEDS,
    bits=BITS,
    symmetric=st.booleans(),
    granularity=st.sampled_from(GRANULARITIES),
    rows=st.integers(1, 5),
    length=st.integers(1, 40),
    group_size=st.integers(1, 45),
)
@settings(deadline=None, max_examples=150)
def test_codes_equal_numpy(
    seed: int,
    bits: int,
    symmetric: bool,
    granularity: str,
    rows: int,
    length: int,
    group_size: int,
) -> None:
    x = random(seed, rows, length)
    size = group_size if granularity == "group" else None
    qmin, qmax = integer(bits, symmetric).codes
    scale, zero_point = choose_qparams(
        x, qmin, qmax, symmetric=symmetric, granularity=granularity, group_size=size
    )
    scale = scale * 0.6  # so that something is clipped
    codes = encode(x, scale, zero_point, qmin, qmax, group_size=size)

    groups = -(-length // group_size)
    shape = {"tensor": (), "group": (rows, groups)}.get(granularity, (rows, 1))
    assert scale.shape == zero_point.shape == shape
    if size is None:
        wanted = unclamped(x, scale.numpy(), zero_point.numpy())
    else:
        wanted = unclamped(x, spread(scale, length, size), spread(zero_point, length, size))
    np.testing.assert_array_equal(codes.numpy(), wanted.clip(qmin, qmax))
    assert codes.dtype == torch.int8
    np.testing.assert_array_equal(rounded_codes(x, scale, zero_point, size).numpy(), wanted)


@given(seed=SEEDS, exponent=st.integers(-8, 1), zero_point=st.integers(-128, 127))
@settings(deadline=None, max_examples=40)
def test_agrees_with_torch_fake_quantize(seed: int, exponent: int, zero_point: int) -> None:
    # torch multiplies by 1/scale; with a power of two both quotients are exact, so all must agree.
    scale, shift = torch.tensor(2.0**exponent), torch.tensor(zero_point, dtype=torch.int32)
    x = random(seed, 8, 33)
    codes = encode(x, scale, shift, -128, 127)
    ours = dequantize(codes, scale, shift)
    theirs = torch.fake_quantize_per_tensor_affine(x, float(scale), zero_point, -128, 127)
    assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_agrees_with_torch_quantize_per_channel() -> None:
    x = random(torch.initial_seed(), 16, 257)
    scale, zero_point = choose_qparams(x, -128, 127, symmetric=False, granularity="channel")
    codes = encode(x, scale, zero_point, -128, 127)
    theirs = torch.quantize_per_channel(
        x, scale.flatten().double(), zero_point.flatten().long(), 0, torch.qint8
    ).int_repr()
    # x * (1/scale) carries one rounding more than x / scale: 2**-23 of at most 256 steps. Only
    # quotients that close to a tie may differ, and by one.
    quotient = x.double() / scale.double()
    near_tie = (quotient - quotient.floor() - 0.5).abs() < 2**-14
    differ = codes != theirs
    assert not (differ & ~near_tie).any()
    assert (codes.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ties_go_to_even(dtype: torch.dtype) -> None:
    ties = torch.arange(-60, 60) + 0.5
    codes = encode(ties.to(dtype), torch.tensor(1.0), None, -127, 127)
    assert codes.tolist() == [round(v) for v in ties.tolist()]


def test_ties_are_broken_before_the_zero_point_is_added() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5])
    codes = encode(x, torch.tensor(1.0), torch.tensor(3, dtype=torch.int32), -8, 7)
    assert codes.tolist() == [3, 5, 5, 3]


@pytest.mark.parametrize(
    ("qmin", "qmax", "dtype"),
    [(0, 255, torch.uint8), (0, 15, torch.uint8), (-3, 5, torch.int8), (-300, 300, torch.int16)],
)
def test_explicit_ranges(qmin: int, qmax: int, dtype: torch.dtype) -> None:
    x = random(torch.initial_seed(), 9, 64)
    scale, zero_point = choose_qparams(x, qmin, qmax, symmetric=False)
    codes = encode(x, scale, zero_point, qmin, qmax, dtype)
    wanted = unclamped(x, scale.numpy(), zero_point.numpy()).clip(qmin, qmax)
    assert codes.dtype == dtype
    np.testing.assert_array_equal(codes.numpy(), wanted)
    assert codes.min() == qmin
    assert codes.max() == qmax


def test_an_empty_tensor_has_no_codes() -> None:
    assert encode(torch.empty(0, 4), torch.tensor(1.0), None, -127, 127).shape == (0, 4)


# --- groups ---------------------------------------------------------------------------------------


def test_groups_that_do_not_divide_need_a_group_size() -> None:
    x, scale = random(1, 4, 10), torch.full((4, 3), 0.1)
    with pytest.raises(ValueError, match="3 groups do not cover 10 columns"):
        encode(x, scale, None, -127, 127)
    codes = encode(x, scale, None, -127, 127, group_size=4)
    assert codes.shape == x.shape


def test_groups_that_divide_need_none() -> None:
    x = random(2, 4, 12)
    scale = torch.rand(4, 3) + 0.1
    assert torch.equal(
        encode(x, scale, None, -127, 127),
        encode(x, scale, None, -127, 127, group_size=4),
    )


@pytest.mark.parametrize("group_size", [1, 3, 6, 12])
def test_a_group_size_that_contradicts_the_scale(group_size: int) -> None:
    with pytest.raises(ValueError, match="groups do not cover 12 columns"):
        expand_groups(torch.ones(4, 3), 12, group_size)


@pytest.mark.parametrize(("columns", "groups", "group_size"), [(3, 5, None), (4, 2, 0)])
def test_more_groups_than_columns_or_size_zero(
    columns: int, groups: int, group_size: int | None
) -> None:
    with pytest.raises(ValueError, match="groups do not cover"):
        expand_groups(torch.ones(2, groups), columns, group_size)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 0, -4])
def test_group_granularity_needs_a_group_size(symmetric: bool, group_size: int | None) -> None:
    with pytest.raises(ValueError, match="needs group_size >= 1"):
        choose_qparams(
            random(1, 2, 8),
            -8,
            7,
            symmetric=symmetric,
            granularity="group",
            group_size=group_size,
        )


@given(seed=SEEDS, length=st.integers(1, 50), group_size=st.integers(1, 60))
@settings(deadline=None, max_examples=60)
def test_group_ranges_slice_by_slice(seed: int, length: int, group_size: int) -> None:
    x = random(seed, 3, length)
    low, high = group_ranges(x, group_size)
    slices = [x[:, start : start + group_size] for start in range(0, length, group_size)]
    assert group_count(length, group_size) == len(slices) == low.shape[1]
    for g, part in enumerate(slices):
        # The short last group is filled with zeros, which every range holds anyway.
        short = part.shape[1] < min(group_size, length)
        wanted_low = part.amin(1).clamp(max=0) if short else part.amin(1)
        wanted_high = part.amax(1).clamp(min=0) if short else part.amax(1)
        assert torch.equal(low[:, g], wanted_low)
        assert torch.equal(high[:, g], wanted_high)


# --- scales ---------------------------------------------------------------------------------------


@given(seed=SEEDS, bits=BITS, dim=st.sampled_from([None, 0, 1, -1, (0, 2), ()]))
@settings(deadline=None, max_examples=40)
def test_symmetric_scale_is_the_largest_magnitude_over_qmax(
    seed: int, bits: int, dim: int | tuple[int, ...] | None
) -> None:
    x = random(seed, 2, 3, 5)
    qmax = integer(bits, symmetric=True).codes[1]
    scale = calc_qparams_symmetric(x, qmax, dim)
    magnitude = np.abs(x.numpy())
    if dim != ():
        magnitude = magnitude.max(axis=dim, keepdims=dim is not None)
    np.testing.assert_array_equal(scale.numpy(), magnitude / np.float32(qmax))


@given(ends=st.tuples(FLOAT32, FLOAT32), bits=BITS)
@example(ends=(-3e38, 3e38), bits=8)  # high - low overflows
@example(ends=(-1e-45, 1e-45), bits=8)  # the quotient underflows
@settings(deadline=None, max_examples=300)
def test_any_finite_range_has_a_usable_affine_scale(ends: tuple[float, float], bits: int) -> None:
    low, high = sorted(ends)
    qmin, qmax = integer(bits, symmetric=False).codes
    scale, zero_point = activation_qparams_from_range(
        torch.tensor(low), torch.tensor(high), qmin, qmax
    )
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)
    assert 0 < float(scale) < math.inf
    assert math.isfinite(float(1 / scale))
    assert qmin <= int(zero_point) <= qmax
    # Zero has an exact code.
    zero = encode(torch.zeros(1), scale, zero_point, qmin, qmax)
    assert dequantize(zero, scale, zero_point).item() == 0
    # high - low in float64 does not overflow. Two divisions and a subtraction of terms of one
    # sign: 3 roundings of 2**-24 each.
    exact = (max(high, 0.0) - min(low, 0.0)) / (qmax - qmin)
    if exact >= 2 * MIN_SCALE:
        assert abs(float(scale) - exact) <= exact * 3 * 2**-24
    else:
        # Quotients that underflow to 0 count as an empty range.
        assert float(scale) in (1.0, pytest.approx(max(exact, MIN_SCALE), rel=2**-20))


@given(value=FLOAT32, bits=BITS)
@settings(deadline=None, max_examples=200)
def test_any_finite_value_has_a_usable_symmetric_scale(value: float, bits: int) -> None:
    qmax = integer(bits, symmetric=True).codes[1]
    scale = calc_qparams_symmetric(torch.tensor([value]), qmax)
    assert 0 < float(scale) < math.inf
    assert math.isfinite(float(1 / scale))
    x = torch.tensor([value])
    codes = encode(x, scale, None, -qmax, qmax)
    assert torch.equal(codes, rounded_codes(x, scale, None))
    # One value alone is the range's end: two roundings of 2**-24. Subnormal ones are lost within
    # half a (smallest) step. The largest float32 may round up to infinity.
    error = abs(dequantize(codes, scale).item() - value)
    if abs(value) < 3.4e38:
        assert error <= max(abs(value) * 2**-22, MIN_SCALE / 2)


def test_all_zero_tensors_have_scale_one() -> None:
    x = torch.zeros(3, 8)
    for symmetric in (True, False):
        for granularity in GRANULARITIES:
            qmin, qmax = integer(8, symmetric).codes
            scale, zero_point = choose_qparams(
                x, qmin, qmax, symmetric=symmetric, granularity=granularity, group_size=3
            )
            codes = encode(x, scale, zero_point, qmin, qmax, group_size=3)
            assert (scale == 1).all()
            assert torch.equal(dequantize(codes, scale, zero_point, group_size=3), x)


@pytest.mark.parametrize("value", [3.7, -3.7, 1e-30, -2e30])
@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_tensors_are_exact_up_to_rounding(value: float, symmetric: bool) -> None:
    x = torch.full((2, 6), value)
    qmin, qmax = integer(4, symmetric).codes
    scale, zero_point = choose_qparams(x, qmin, qmax, symmetric=symmetric)
    codes = encode(x, scale, zero_point, qmin, qmax)
    assert torch.equal(codes, rounded_codes(x, scale, zero_point))
    # The constant is an end of the range: one division and one product apart, 2**-24 each.
    torch.testing.assert_close(dequantize(codes, scale, zero_point), x, rtol=2**-22, atol=0)


@pytest.mark.parametrize(("low", "high"), [(2.0, 6.0), (-6.0, -2.0)])
def test_a_range_without_zero_is_widened_to_hold_it(low: float, high: float) -> None:
    ends = torch.tensor(low), torch.tensor(high)
    scale, zero_point = activation_qparams_from_range(*ends, -128, 127)
    assert float(scale) == pytest.approx(6 / 255, rel=2**-22)
    assert int(zero_point) == (-128 if low > 0 else 127)


def test_one_row_of_zeros_among_others() -> None:
    x = torch.cat((random(3, 2, 9), torch.zeros(1, 9)))
    scale, zero_point = choose_qparams(x, -128, 127, symmetric=False, granularity="token")
    assert scale[2].item() == 1
    assert (scale[:2] != 1).all()
    codes = encode(x, scale, zero_point, -128, 127)
    assert torch.equal(dequantize(codes, scale, zero_point)[2], x[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_half_precision_inputs_have_float32_scales(dtype: torch.dtype, symmetric: bool) -> None:
    x = random(torch.initial_seed(), 4, 32, dtype=dtype)
    qmin, qmax = integer(8, symmetric).codes
    for granularity in GRANULARITIES:
        options = {"granularity": granularity, "group_size": 5}
        half = choose_qparams(x, qmin, qmax, symmetric=symmetric, **options)  # type: ignore[arg-type]
        full = choose_qparams(x.float(), qmin, qmax, symmetric=symmetric, **options)  # type: ignore[arg-type]
        assert half[0].dtype == torch.float32
        assert torch.equal(half[0], full[0])
        assert torch.equal(half[1], full[1])
        codes = encode(x, *half, qmin, qmax, group_size=5)
        wanted = encode(x.float(), *full, qmin, qmax, group_size=5)
        assert torch.equal(codes, wanted)


# --- errors of the round trip ---------------------------------------------------------------------


@given(
    seed=SEEDS,
    bits=BITS,
    symmetric=st.booleans(),
    granularity=st.sampled_from(GRANULARITIES),
    factor=st.sampled_from([1e-36, 1e-3, 1.0, 1e30]),
)
@settings(deadline=None, max_examples=100)
def test_the_error_is_at_most_half_a_step(
    seed: int, bits: int, symmetric: bool, granularity: str, factor: float
) -> None:
    x = random(seed, 4, 21) * factor
    qmin, qmax = integer(bits, symmetric).codes
    scale, zero_point = choose_qparams(
        x, qmin, qmax, symmetric=symmetric, granularity=granularity, group_size=8
    )
    codes = encode(x, scale, zero_point, qmin, qmax, group_size=8)
    x_hat = dequantize(codes, scale, zero_point, group_size=8)
    step = torch.from_numpy(spread(scale, 21, 8)) if granularity == "group" else scale
    # In steps, beyond 1/2: quotients are at most 256, so the division and the product are off by
    # 256 * 2**-24 each, and at the ends of an affine range the scale's and the zero point's own
    # roundings add at most 2 * 3 * 256 * 2**-24: together below 2**-13.
    error = (x.double() - x_hat.double()).abs()
    assert (error <= step.double() * (0.5 + 2**-13)).all()


@given(seed=SEEDS, size=st.integers(1, 20))
@settings(deadline=None, max_examples=30)
def test_dequantize_by_hand(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (3, size), dtype=torch.int8, generator=generator)
    zero_point = torch.randint(-128, 128, (3, 1), dtype=torch.int32, generator=generator)
    scale = torch.rand(3, 1, generator=generator) + 0.01
    # codes - zero_point spans -255..255, which int8 could not hold.
    wanted = (codes.numpy().astype(np.int64) - zero_point.numpy()) * scale.numpy().astype(float)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        result = dequantize(codes, scale, zero_point, dtype=dtype)
        assert result.dtype == dtype
        # An int below 256 times a float32 is rounded to float32, then to dtype.
        assert torch.equal(result, torch.from_numpy(wanted).float().to(dtype))
    without = codes.numpy() * scale.numpy().astype(float)
    assert torch.equal(dequantize(codes, scale), torch.from_numpy(without).float())


@given(seed=SEEDS)
@settings(deadline=None, max_examples=20)
def test_quantizing_again_changes_nothing(seed: int) -> None:
    x = random(seed, 5, 16)
    scale, zero_point = choose_qparams(x, -128, 127, symmetric=False, granularity="token")
    codes = encode(x, scale, zero_point, -128, 127)
    again = encode(dequantize(codes, scale, zero_point), scale, zero_point, -128, 127)
    assert torch.equal(codes, again)


def test_inputs_are_not_modified() -> None:
    x, scale = random(4, 3, 8), torch.full((3, 1), 0.02)
    kept = x.clone(), scale.clone()
    codes = encode(x, scale, None, -127, 127)
    kept_codes = codes.clone()
    dequantize(codes, scale)
    assert torch.equal(x, kept[0])
    assert torch.equal(scale, kept[1])
    assert torch.equal(codes, kept_codes)


# --- measures and checks --------------------------------------------------------------------------


def test_each_bit_more_is_worth_six_decibels() -> None:
    x = torch.rand(1, 20000, generator=torch.Generator().manual_seed(6)) - 0.5
    levels = []
    for bits in (4, 5, 6, 7):
        scale, zero_point = choose_qparams(x, *integer(bits, False).codes, symmetric=False)
        codes = encode(x, scale, zero_point, *integer(bits, False).codes)
        levels.append(sqnr_db(x, dequantize(codes, scale, zero_point)))
    # Uniform noise: the step halves as the levels go from 2**b - 1 to 2**(b+1) - 1, 20 log10 of
    # that is 6.3 at 4 bits and 6.05 at 7; sampling noise of 20000 values is below 0.1 dB.
    assert all(5.8 < after - before < 6.5 for before, after in itertools.pairwise(levels))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_check_finite_names_site_and_count(bad: float, dtype: torch.dtype) -> None:
    x = random(7, 3, 5).to(dtype)
    check_finite(x, "its weight", "decoder.layers.3.fc1")
    x[1, 2] = bad
    x[2, 4] = bad
    with pytest.raises(
        NonFiniteError, match=r"decoder\.layers\.3\.fc1: its weight holds 2 NaN .* of 15"
    ):
        check_finite(x, "its weight", "decoder.layers.3.fc1")
