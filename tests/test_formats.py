"""Number formats: integers, listed levels, and a grid of the test's own through the whole tool."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxquant
from fxquant.errors import SchemeError
from fxquant.formats.grid import Grid
from fxquant.formats.integer import integer
from fxquant.formats.levels import LevelGrid
from fxquant.formats.table import GRIDS, grid_named
from fxquant.ir.graph import info
from fxquant.schemes.scheme import Scheme
from tests.architectures import llama, token_ids

# Three bits with levels of its own: finer about 0, further on the positive side.
TOY = LevelGrid("toy3", (-4.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 6.0))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> LevelGrid:
    monkeypatch.setitem(GRIDS, TOY.name, TOY)
    return TOY


def nearest(levels: list[Fraction], value: Fraction) -> int:
    """Place of the nearest level by exact comparison; of two at one distance the even one."""
    best = min(abs(level - value) for level in levels)
    places = [i for i, level in enumerate(levels) if abs(level - value) == best]
    return next((p for p in places if p % 2 == 0), places[0])


@st.composite
def level_grids(draw: st.DrawFn) -> LevelGrid:
    some = st.integers(1, 400)
    below = draw(st.sets(some, min_size=1, max_size=8))
    above = draw(st.sets(some, min_size=1, max_size=8))
    levels = sorted([*(-n / 16 for n in below), 0.0, *(n / 16 for n in above)])
    return LevelGrid("drawn", tuple(levels))


@given(grid=level_grids(), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=80)
def test_levels_are_the_nearest_and_ties_go_to_even_places(grid: LevelGrid, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    span = grid.highest - grid.lowest
    values = torch.rand(40, generator=generator) * 2 * span + grid.lowest - span / 2
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(grid.levels)])
    values = torch.cat((values, middles, torch.tensor(grid.levels)))
    exact = [Fraction(level) for level in grid.levels]
    wanted = [nearest(exact, Fraction(v)) for v in values.tolist()]
    rounded = grid.nearest_(values.clone())
    assert rounded.tolist() == [grid.levels[place] for place in wanted]
    codes = grid.encode(rounded)
    assert (codes - grid.codes[0]).tolist() == wanted
    assert torch.equal(grid.decode(codes), rounded)
    table = codes.view(1, -1)
    assert torch.equal(grid.unpack(grid.pack(table), table.shape[1]), table)


@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_integers_round_half_to_even_and_saturate(bits: int, symmetric: bool, seed: int) -> None:
    grid = integer(bits, symmetric)
    low, high = grid.codes
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-600, 600, (50,), generator=generator) / 4
    zero_point = None if symmetric else torch.randint(low, high + 1, (50,), generator=generator)
    shift = [0] * 50 if zero_point is None else zero_point.tolist()
    wanted = [
        min(max(round(v) + z, low), high) - z for v, z in zip(values.tolist(), shift, strict=True)
    ]
    assert grid.nearest_(values.clone(), zero_point).tolist() == wanted


@pytest.mark.parametrize(
    "levels", [(-1.0, 1.0), (-1.0, 0.0, 0.0, 1.0), (0.0, 1.0, 2.0), (1.0, 0.0, -1.0)]
)
def test_levels_that_make_no_grid_are_refused(levels: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="odd"):
        LevelGrid("odd", levels)


def test_grids_are_found_by_name() -> None:
    assert grid_named("int4-asym") == integer(4, symmetric=False)
    with pytest.raises(SchemeError, match=r"'int9'.*int8"):
        grid_named("int9")


@pytest.mark.parametrize(
    "text",
    ["wtoy3", "wtoy3-g16", "wtoy3-tensor", "wtoy3/atoy3-dynamic-token", "w4-g8/atoy3-static"],
)
def test_a_new_grid_is_spelled_like_others(toy: LevelGrid, text: str) -> None:
    scheme = Scheme.parse(text)
    assert str(scheme) == text
    assert toy in [s.grid for s in (scheme.spec.weight,) if s] or scheme.spec.activation is not None
    with pytest.raises(SchemeError, match="no zero point"):
        Scheme.parse("wtoy3-asym")


def test_an_unknown_grid_is_not_understood() -> None:
    with pytest.raises(SchemeError, match="a number of bits"):
        Scheme.parse("wtoy3")


def on_toy(x: Tensor, dim: int | None) -> Tensor:
    """x float64 with the nearest toy level times absmax / reach, by brute force."""
    peak = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = peak.float().double() / TOY.reach
    scale = scale.float().double()
    levels = torch.tensor(TOY.levels, dtype=torch.float64)
    steps = (x.float() / scale.float()).double()
    return levels[(steps[..., None] - levels).abs().argmin(-1)] * scale


@torch.no_grad()
@pytest.mark.parametrize(
    "text", ["wtoy3", "wtoy3/atoy3-dynamic-token", "wtoy3/atoy3-static:absmax"]
)
def test_a_new_grid_converts_as_a_module_swap_says(toy: LevelGrid, text: str) -> None:
    model = llama()
    ids = token_ids(2, 9)
    qmodel = fxquant.convert(model, text, calibration=[ids])
    found = qmodel(input_ids=ids)
    reference = llama().double()
    peaks: dict[str, Tensor] = {}
    if "static" in text:
        hooks = [
            part.register_forward_pre_hook(
                lambda _, args, path=path: peaks.__setitem__(path, args[0].abs().max())
            )
            for path, part in reference.named_modules()
            if isinstance(part, nn.Linear)
        ]
        reference(input_ids=ids)
        for hook in hooks:
            hook.remove()
    for path in (site.path for site in info(qmodel).sites if site.role == "linear"):
        layer = reference.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        layer.weight.data = on_toy(layer.weight.data, -1)
        if "token" in text:
            layer.register_forward_pre_hook(lambda _, args: (on_toy(args[0], -1),))
        elif "static" in text:
            layer.register_forward_pre_hook(
                lambda _, args, peak=peaks[path]: (static_toy(args[0], peak),)
            )
    wanted = reference(input_ids=ids).logits
    gap = (wanted - llama().double()(input_ids=ids).logits).norm()
    # Few levels: a value near a middle may flip by a float32 rounding before it.
    assert float((found.double() - wanted).norm() / gap) < 0.05


def static_toy(x: Tensor, peak: Tensor) -> Tensor:
    scale = (peak.float() / TOY.reach).double()
    levels = torch.tensor(TOY.levels, dtype=torch.float64)
    steps = (x.float() / scale.float()).double()
    return levels[(steps[..., None] - levels).abs().argmin(-1)] * scale


def test_a_new_grid_is_explained_printed_and_saved(toy: LevelGrid, tmp_path: Path) -> None:
    model = llama()
    ids = token_ids(2, 9)
    why = fxquant.explain(model, "wtoy3-g16/a8-dynamic-token", data=[ids])
    assert why.causes is not None
    assert abs(sum(why.causes.values()) - why.delta_loss) < 1e-5
    qmodel = fxquant.convert(model, "wtoy3-g16+gptq", calibration=[ids])
    printed = str(fxquant.inspect(qmodel).layer(0))
    assert "the number of each toy3 code" in printed
    assert "toy3" in str(fxquant.inspect(qmodel))
    fxquant.save(qmodel, tmp_path / "toy")
    again = fxquant.load(tmp_path / "toy")
    assert torch.equal(again(input_ids=ids), qmodel(input_ids=ids))


@torch.no_grad()
def test_gptq_helps_on_a_new_grid(toy: LevelGrid) -> None:
    model = llama()
    ids = token_ids(8, 24)
    wanted = model(input_ids=ids).logits
    plain, better = (
        fxquant.convert(model, scheme, calibration=[ids])(input_ids=ids) - wanted
        for scheme in ("wtoy3-g16", "wtoy3-g16+gptq")
    )
    assert float(better.norm()) < float(plain.norm())


def test_every_grid_in_the_table_keeps_its_promises() -> None:
    for name, grid in GRIDS.items():
        assert isinstance(grid, Grid)
        assert grid.name == name
        numbers = torch.tensor(grid.levels)
        assert bool((numbers.diff() > 0).all())
        assert (float(numbers[0]), float(numbers[-1])) == (grid.lowest, grid.highest)
        assert torch.equal(grid.nearest_(numbers.clone()), numbers)
        with_nan = grid.nearest_(torch.tensor([math.nan, 0.3]))
        assert with_nan.isnan().tolist() == [True, False]
        codes = grid.encode(numbers)
        assert codes.dtype == grid.storage
        assert grid.valid(codes)
        assert torch.equal(grid.decode(codes), numbers)
        table = codes.view(1, -1)
        unpacked = grid.unpack(grid.pack(table), table.shape[1])
        assert torch.equal(grid.decode(unpacked), numbers[None])
        quanta = numbers.double() / grid.quantum
        assert torch.equal(quanta, quanta.round())
        assert bool((quanta / 2 != (quanta / 2).round()).any())  # and of no larger power of two
