"""What is counted as clipped is what quantization clips, element by element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.numerics.clipping import clipped_codes, count_clipped, unclipped_range

CODES = ((-127, 127), (-128, 127), (-8, 7), (-7, 7), (-2, 1))


def outside(x: Tensor, scale: Tensor, shift: Tensor | None, qmin: int, qmax: int) -> int:
    """How many of ``x`` have a code that has to be clamped."""
    codes = torch.round(x.to(torch.float32) / scale)
    if shift is not None:
        codes = codes + shift
    return int(((codes < qmin) | (codes > qmax)).sum())


def around(ends: Tensor) -> Tensor:
    """Each end and its eight nearest float32 numbers."""
    found = [ends]
    for direction in (torch.inf, -torch.inf):
        value = ends
        for _ in range(4):
            value = torch.nextafter(value, torch.full_like(value, direction))
            found.append(value)
    return torch.stack(found, -1).flatten()


@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-37, 30),
    codes=st.sampled_from(CODES),
    affine=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(deadline=None, max_examples=300)
def test_the_range_is_exact(
    seed: int, exponent: float, codes: tuple[int, int], affine: bool, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(seed)
    qmin, qmax = codes
    scale = (torch.rand((), generator=g) + 0.5) * 10**exponent
    zero_point = torch.randint(qmin, qmax + 1, (), generator=g, dtype=torch.int32)
    shift = zero_point if affine else None
    low, high = unclipped_range(scale, shift, qmin, qmax)
    spread = torch.randn(50, generator=g) * scale * (qmax - qmin)
    x = torch.cat((around(low), around(high), spread)).to(dtype)
    x = x[torch.isfinite(x)]
    for each in x:
        wanted = outside(each, scale, shift, qmin, qmax)
        assert int(count_clipped(each.reshape(1), low, high)) == wanted, (each, scale, shift)


@pytest.mark.parametrize("affine", [True, False])
def test_a_scale_for_each_token(affine: bool) -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(3, 5, 40, generator=g).half()
    scale = torch.rand(3, 5, 1, generator=g) / 60
    zero_point = torch.randint(-20, 20, scale.shape, generator=g, dtype=torch.int32)
    shift = zero_point if affine else None
    wanted = outside(x, scale, shift, -127, 127)
    assert 0.1 < wanted / x.numel() < 0.9
    found = count_clipped(x, *unclipped_range(scale, shift, -127, 127))
    assert int(found) == wanted
    assert int(clipped_codes(x, scale, shift, -127, 127)) == int(found)


def test_a_range_of_its_own_clips_at_a_tie_alone() -> None:
    # 255 steps from -0.5 to 254.5: the zero point and both ends are ties.
    x = torch.tensor([[-0.5, 3.0, 254.5], [-1.0, 3.0, 254.0]])
    scale, zero_point = torch.ones(2, 1), torch.tensor([[-128], [-127]], dtype=torch.int32)
    for dtype in (torch.float32, torch.float16):
        assert int(clipped_codes(x.to(dtype), scale, zero_point, -128, 127)) == 0
    zero_point[0] = -127  # as if the zero point had been rounded up
    assert int(clipped_codes(x, scale, zero_point, -128, 127)) == 0
    x[0, 2] = 254.75
    assert int(clipped_codes(x, scale, zero_point, -128, 127)) == 1
