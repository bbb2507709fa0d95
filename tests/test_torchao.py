"""Block formats against torchao's, bit by bit: MX in every rule that it has, and NVFP4.

Not just above a power of two under rceil: torchao's logarithm in float32 gives the power itself.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.formats.table import GRIDS, SCALES
from fxquant.numerics.weight_codes import min_max_codes
from fxquant.schemes.specs import TensorSpec

pytestmark = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao is not here: make test-torchao brings it"
)
RULES = ("floor", "ceil", "rceil", "even")
ELEMENTS = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")
# Ways apart: x * ((1 / g) / s) there, x / (s * g) here; a quotient within some ulp of a middle
# between two numbers may go to either.
ULPS = 4 * 2**-23


def mx(x: Tensor, element: str, block: int, rule: str) -> tuple[Tensor, Tensor]:
    """torchao's scales and codes, one code an element."""
    from torchao.prototype.mx_formats import constants
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.kernels import unpack_uint4
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    kinds: dict[str, Any] = {
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "e3m2": constants.DTYPE_FP6_E3M2,
        "e2m3": constants.DTYPE_FP6_E2M3,
        "e2m1": torch.float4_e2m1fn_x2,
    }
    scales, codes = to_mx(x, kinds[element], block, ScaleCalculationMode(rule))
    codes = unpack_uint4(codes) if element == "e2m1" else codes
    return scales.view(torch.uint8), codes.view(torch.uint8)


def samples(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows of every size, sparse ones, blocks of zeros, values on the numbers and between them."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.ldexp(torch.ones(rows, 1), torch.randint(-60, 60, (rows, 1), generator=generator))
    x[:, :64][::3] = 0
    steps = torch.randint(-64, 65, (rows, columns), generator=generator) / 8
    x[1::4] = torch.ldexp(steps, torch.randint(-9, 9, (rows, 1), generator=generator))[1::4]
    return x.to(dtype)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mx_is_torchaos(element: str, rule: str, dtype: torch.dtype) -> None:
    name = "e8m0" if rule == "floor" else f"e8m0-{rule}"
    for block in (32, 16, 64):
        x = samples(96, 256, dtype)
        spec = TensorSpec(GRIDS[element], "group", block, SCALES[name])
        found = min_max_codes(x, spec, "here")
        scales, codes = mx(x, element, block, rule)
        assert torch.equal(spec.scale.encode(found.scales), scales)
        assert torch.equal(found.codes.view(torch.uint8), codes)  # signs of zeros too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_is_torchaos(dtype: torch.dtype) -> None:
    from torchao.prototype.mx_formats.kernels import unpack_uint4
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    x = samples(96, 256, dtype)
    x = x / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30).to(dtype)  # rows of one size
    spec = TensorSpec(GRIDS["e2m1"], "group", 16, SCALES["e4m3"])
    found = min_max_codes(x, spec, "here")
    shared = per_tensor_amax_to_scale(x.abs().max())
    assert found.global_scale is not None
    assert torch.equal(found.global_scale.reshape(()), shared.reshape(()))
    scales, codes = nvfp4_quantize(x, 16, shared)
    kept = spec.scale.encode(found.scales, found.global_scale)
    assert torch.equal(kept.view(torch.uint8), scales.view(torch.uint8))
    ours = spec.grid.decode(found.codes)
    theirs = spec.grid.decode(unpack_uint4(codes))
    steps = x.double() / found.scales.double().repeat_interleave(16, -1)
    levels = torch.tensor(spec.grid.levels, dtype=torch.float64)
    middles = (levels[1:] + levels[:-1]) / 2
    tie = ((steps[..., None] - middles).abs() <= ULPS * middles.abs()).any(-1)
    assert torch.equal(ours[~tie], theirs[~tie])
    assert float(tie.double().mean()) < 0.2
