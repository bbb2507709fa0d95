"""Floating-point grids and scales in a byte, against enumeration and exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.formats.floating import E2M1, E2M3, E3M2, E4M3, E5M2, FloatGrid
from fxquant.formats.grid import Grid
from fxquant.formats.integer import integer
from fxquant.formats.levels import NF4, LevelGrid
from fxquant.formats.scales import E4M3_SCALE, FP32, POWERS, PowerScale
from fxquant.formats.table import GRIDS
from fxquant.numerics.code_products import exact_dtype, exact_length, product, runs

FLOATS = (E4M3, E5M2, E3M2, E2M3, E2M1)
OF_TORCH = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def places_between(grid: Grid) -> Tensor:
    """Every level, every middle of two, and what lies next to them; far beyond the ends too."""
    levels = torch.tensor(grid.levels)
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(grid.levels)])
    exact = torch.cat((levels, middles))
    ends = torch.tensor([grid.highest * 1.03, grid.highest * 4, 3.4e38, math.inf, 1e-30, 1e-41])
    return torch.cat(
        (
            *(exact, torch.nextafter(exact, torch.tensor(math.inf))),
            *(torch.nextafter(exact, torch.tensor(-math.inf)), ends, -ends, torch.tensor([-0.0])),
        )
    )


@pytest.mark.parametrize("grid", OF_TORCH, ids=lambda grid: grid.name)
def test_bytes_are_those_of_torch(grid: FloatGrid) -> None:
    patterns = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    theirs = patterns.view(OF_TORCH[grid])
    numbers = theirs.to(torch.float32)
    known = numbers.isfinite()
    assert [grid.valid(each.view(1)) for each in theirs] == known.tolist()
    assert len(set(numbers[known].tolist())) == len(grid.levels)
    assert sorted(set(numbers[known].tolist())) == list(grid.levels)
    values = torch.cat((numbers[known], places_between(grid)))
    wanted = values.clamp(-grid.highest, grid.highest).to(OF_TORCH[grid])
    for codes in (grid.encode(grid.nearest_(values.clone())), grid.nearest_codes(values.clone())):
        assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))
    everything = torch.arange(-(2**31), 2**31, 40_009, dtype=torch.int64).to(torch.int32)
    values = everything.view(torch.float32)  # some of all floats there are
    values = values[values.isfinite()]
    wanted = values.clamp(-grid.highest, grid.highest).to(OF_TORCH[grid]).to(torch.float32)
    found = grid.nearest_(values.clone())
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))
    assert torch.equal(grid.nearest_(values.double()), wanted.double())


@pytest.mark.parametrize("grid", OF_TORCH, ids=lambda grid: grid.name)
def test_every_byte_is_widened_as_torch_does(grid: FloatGrid) -> None:
    patterns = torch.arange(256, dtype=torch.int16).to(torch.uint8)[torch.randperm(256)]
    for codes in (patterns, patterns.view(2, 4, 32).mT, patterns[3], patterns[:0].view(0, 5)):
        theirs = codes.view(OF_TORCH[grid])
        found, wanted = grid.decode(theirs), theirs.to(torch.float32)
        assert found.shape == wanted.shape
        assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))  # NaN and -0 too


# Levels that need float32's whole mantissa: float32 does not hold most middles of theirs.
FINE = LevelGrid("fine", (-1.0, -0.1, 0.0, *torch.rand(12).sort().values.tolist(), 1.5))


@pytest.mark.parametrize("grid", [*FLOATS, NF4, FINE], ids=lambda grid: grid.name)
def test_the_nearest_number_and_of_two_the_one_with_an_even_pattern(grid: Grid) -> None:
    values = places_between(grid)
    values = torch.cat((values, torch.randn(300) * grid.highest / 3))
    rounded = grid.nearest_(values.clone())
    codes = grid.encode(rounded).view(torch.uint8).tolist()
    exact = [Fraction(level) for level in torch.tensor(grid.levels).tolist()]
    for value, number, code in zip(values.tolist(), rounded.tolist(), codes, strict=True):
        clamped = Fraction(min(max(value, grid.lowest), grid.highest))
        least = min(abs(level - clamped) for level in exact)
        assert abs(Fraction(number) - clamped) == least
        tie = sum(abs(level - clamped) == least for level in exact) > 1
        assert not (tie and code % 2)
        if number or isinstance(grid, FloatGrid):
            assert math.copysign(1, number) == math.copysign(1, value)


def test_numbers_of_the_small_grids_are_those_of_the_specification() -> None:
    assert [v for v in E2M1.levels if v >= 0] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert {grid.name: grid.highest for grid in FLOATS} == {
        **{"e4m3": 448, "e5m2": 57344, "e3m2": 28, "e2m3": 7.5, "e2m1": 6},
    }
    assert [grid.top_exponent for grid in FLOATS] == [8, 15, 4, 2, 2]
    codes = torch.tensor([[0x1, 0xF, 0x7]], dtype=torch.uint8)
    assert E2M1.decode(codes).tolist() == [[0.5, -6.0, 6.0]]
    assert E2M1.pack(codes).tolist() == [[0xF1, 0x7]]
    assert E3M2.decode(torch.tensor([1, 31, 63], dtype=torch.uint8)).tolist() == [0.0625, 28, -28]
    assert len(NF4.levels) == 16
    assert not E3M2.valid(torch.tensor([64], dtype=torch.uint8))


def exact_power(largest: float, grid: Grid, rule: str) -> int:
    """The exponent of the scale by exact arithmetic."""
    if rule == "rceil":
        ratio = Fraction(largest) / Fraction(grid.reach)
        return next(e for e in range(-127, 128) if Fraction(2) ** e >= ratio)
    value = Fraction(largest)
    floor = next(e for e in range(130, -160, -1) if Fraction(2) ** e <= value)
    if rule == "ceil":
        floor += Fraction(2) ** floor != value
    if rule == "even":
        assert isinstance(grid, FloatGrid)
        floor += value >= Fraction(2) ** floor * (2 - Fraction(1, 2 ** (grid.mantissa + 1)))
    return max(floor - grid.top_exponent, -127)


@given(
    grid=st.sampled_from(FLOATS),
    scale=st.sampled_from(POWERS),
    largest=st.floats(2.0**-100, 2.0**100, width=32),
)
@settings(deadline=None, max_examples=150)
def test_powers_of_two_follow_their_rule(grid: Grid, scale: PowerScale, largest: float) -> None:
    found = scale.scales(torch.tensor([largest]), grid)
    assert math.log2(float(found)) == exact_power(largest, grid, scale.rule)
    stored = scale.encode(found)
    assert stored.dtype == torch.uint8
    assert torch.equal(scale.decode(stored), found)
    if scale.rule == "rceil":
        assert largest / float(found) <= grid.reach  # nothing is clipped


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_rceil_tells_a_power_from_what_lies_beside_it(grid: Grid) -> None:
    rceil = next(scale for scale in POWERS if scale.rule == "rceil")
    exponents = [-127, -126, *range(-121, 110, 11)]
    at = torch.tensor([grid.reach * 2.0**exponent for exponent in exponents])
    beside = [torch.nextafter(at, torch.tensor(way)) for way in (0.0, math.inf)]
    for largest in (at, *beside):
        found = rceil.scales(largest, grid).double().log2().tolist()
        assert found == [exact_power(each, grid, "rceil") for each in largest.tolist()]


@pytest.mark.parametrize("scale", POWERS, ids=lambda scale: scale.name)
def test_every_byte_of_a_power_is_its_number(scale: PowerScale) -> None:
    stored = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    numbers = scale.decode(stored)
    wanted = stored.view(torch.float8_e8m0fnu).to(torch.float32)
    assert torch.equal(numbers[:255], wanted[:255])
    assert bool(numbers[255].isnan())
    assert torch.equal(scale.encode(numbers), stored)
    assert scale.valid(stored[:255])
    assert not scale.valid(stored[255:])
    # Zeros alone have a scale too, and a NaN is kept.
    ends = scale.scales(torch.tensor([0.0, math.nan, math.inf]), E2M1)
    assert ends.isnan().tolist() == [False, True, True]
    assert float(ends[0]) == 2.0**-127


def test_scales_in_e4m3_under_one_for_all() -> None:
    largest = torch.rand(200) * torch.logspace(-6, 2, 200)
    shared = E4M3_SCALE.global_scale(largest.max(), E2M1)
    assert shared is not None
    assert float(shared) == pytest.approx(float(largest.max()) / (448 * 6), rel=1e-6)
    found = E4M3_SCALE.scales(largest, E2M1, shared)
    codes = E4M3_SCALE.encode(found, shared)
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(E4M3_SCALE.decode(codes, shared), found)
    assert float(codes.to(torch.float32).min()) == 2.0**-6
    wanted = (largest / 6 / shared).clamp(2.0**-6, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))
    zero = E4M3_SCALE.global_scale(torch.zeros(()), E2M1)
    assert zero is not None
    assert float(zero) == 1.0
    assert not E4M3_SCALE.valid(torch.zeros(1).to(torch.float8_e4m3fn))
    assert FP32.scales(torch.zeros(1), E2M1).tolist() == [1.0]


def test_certificates_are_those_of_exact_arithmetic() -> None:
    assert exact_length(E4M3, E4M3, 53) == 171_196
    assert exact_length(E2M1, E2M1, 24) == 116_508
    assert exact_length(E5M2, E5M2, 53) == 0
    assert exact_length(NF4, NF4, 53) < 4
    assert exact_dtype(E2M1, E2M1, 32) == torch.float32
    assert exact_dtype(E4M3, E4M3, 32) == torch.float64
    assert exact_dtype(integer(4, symmetric=False), integer(8, symmetric=False), 4096) == (
        torch.float32
    )
    for name, grid in GRIDS.items():  # the largest products, all of one sign: nothing is rounded
        length = min(exact_length(grid, grid, 53), 4096)
        if length < 2:
            continue
        largest = max(grid.levels[-1], -grid.levels[0])
        x = torch.tensor([largest, grid.quantum]).repeat(length // 2)[None]
        exact = sum(Fraction(value) ** 2 for value in x[0].tolist())
        assert Fraction(float(product(x, x, torch.float64))) == exact, name


@given(length=st.integers(1, 70), x=st.integers(0, 40), weight=st.integers(0, 40))
@settings(deadline=None, max_examples=60)
def test_runs_lie_in_one_group_of_each(length: int, x: int, weight: int) -> None:
    if not x and not weight:
        return
    found = list(runs(length, x, weight))
    assert [c for start, end in found for c in range(start, end)] == list(range(length))
    for size in (each for each in (x, weight) if each):
        assert all(start // size == (end - 1) // size for start, end in found)
