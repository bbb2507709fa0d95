"""Quantization on any grid the plain way, in float64: each linear's weight and input swapped.

Of fxquant only the names are used: what a scheme's text says, and the numbers of each grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.formats.table import GRIDS
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import TensorSpec
from tests.architectures import llama

# What float32 leaves of float64, by norms: a site's sums have at most 64 terms, and each addition
# is off by 2^-24 of its result at most.
ROUNDINGS = 64 * 2.0**-24


def in_groups(x: Tensor, spec: TensorSpec) -> list[Tensor]:
    """Slices of the last dimension that share a scale."""
    return list(x.split(spec.group_size or x.shape[-1], -1))


def power(largest: float, grid: Any, rule: str) -> float:
    if not largest:
        return 1.0
    exponent = math.floor(math.log2(largest))
    if rule == "rceil":
        return 2.0 ** math.ceil(math.log2(largest / grid.reach))
    exponent += rule == "ceil" and 2.0**exponent != largest
    exponent += rule == "even" and largest >= 2.0**exponent * (2 - 0.5 ** (grid.mantissa + 1))
    return math.ldexp(1.0, exponent - grid.top_exponent)


def scale_of(largest: Tensor, spec: TensorSpec, whole: float) -> Tensor:
    """float64 scales of groups by their largest magnitudes, one by one."""
    grid, name = spec.grid, spec.scale.name
    if name == "fp32":
        return torch.where(largest == 0, 1.0, (largest / grid.reach)).float().double()
    if name == "fp16":
        return half((largest / grid.reach).float(), 11)
    if name == "e4m3":
        shared = torch.tensor(whole / (448 * grid.reach)).float()
        wanted = (largest.float() / grid.reach / shared).clamp(2.0**-6, 448).double()
        return on_levels(wanted, GRIDS["e4m3"]) * shared.double()
    rule = name.removeprefix("e8m0").removeprefix("-") or "floor"
    return largest.clone().apply_(lambda value: power(value, grid, rule))


def half(scale: Tensor, digits: int) -> Tensor:
    """float64: the fp16 number of so many binary digits next to a float32 scale, 0 not being one;
    1 for a scale of 0."""
    scale = torch.where(scale == 0, 1.0, scale).double()
    # Below 2^-14 fp16 keeps fewer digits, down to 2^-24.
    quantum = 2.0 ** (torch.frexp(scale).exponent.clamp(min=digits - 24) - digits).double()
    found: Tensor = ((scale / quantum).round() * quantum).clamp(min=2.0**-24)
    return found


def on_levels(steps: Tensor, grid: Any) -> Tensor:
    """The nearest level, float64; of two at one distance that with the even code."""
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    even = [int(c) % 2 for c in grid.encode(levels.float()).view(torch.uint8).tolist()]
    distance = (steps[..., None] - levels).abs() * (1 + torch.tensor(even).double() * 1e-13)
    return levels[distance.argmin(-1)]


def coded(x: Tensor, spec: TensorSpec, peak: Tensor | None = None) -> Tensor:
    """x float64 as codes of ``spec`` stand for it; ``peak``: the largest of a static range."""
    grid, x = spec.grid, x.float().double()
    if grid.has_zero_point:
        return affine(x, spec)
    whole = float(x.abs().max())
    parts = []
    for part in in_groups(x, spec):
        largest = part.abs().amax(-1, keepdim=True)
        if spec.granularity == "tensor":
            largest = part.abs().max() if peak is None else peak
        scale = scale_of(largest, spec, whole)
        parts.append(on_levels((part.float() / scale.float()).double(), grid) * scale)
    return torch.cat(parts, -1)


def affine(x: Tensor, spec: TensorSpec) -> Tensor:
    first, last = spec.grid.codes
    parts = []
    for part in in_groups(x, spec):
        low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        if spec.granularity == "tensor":
            low, high = part.min(), part.max()
        # In float32, by definition: a zero point next to a middle is another one in float64.
        low, high, steps = low.float().clamp(max=0), high.float().clamp(min=0), last - first
        scale = high / steps - low / steps
        if spec.scale.name == "fp16":
            scale = half(scale, 11 if spec.grid.bits > 4 else 11 - spec.grid.bits).float()
        shift = (first - low / scale).round().clamp(first, last)
        codes = ((part.float() / scale).round() + shift).clamp(first, last)
        parts.append((codes - shift).double() * scale.double())
    return torch.cat(parts, -1)


def inputs_of(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The largest magnitude that each linear of the float model reads, a float32 number: rounded
    after the division it can give the scale next to the one of a float32 quantizer."""
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: found.update(
                    {name: args[0].abs().max().float().double()}
                )
            )
    model(input_ids=ids)
    return found


class Arriving:
    """Inputs of a graph's sites in the order in which they are read, in place of the reference's.

    Each is held against the reference's own first. In this way a value next to a middle has the
    same code in both, where a float32 rounding would move it to the other side.
    """

    def __init__(self, inputs: Sequence[Tensor], scheme: str) -> None:
        self.scheme = scheme
        self.left, self.own, self.read = list(inputs), torch.empty(0), torch.empty(0)

    def __call__(self, own: Tensor) -> Tensor:
        if own is not self.own:  # q, k and v read one tensor
            self.own, self.read = own, self.left.pop(0).double()
            apart = float((self.read - own).norm() / own.norm())
            place = f"input {len(self.left) + 1} from the end"
            assert apart < ROUNDINGS, f"{self.scheme}, {place}: {apart:.1e} apart"
        return self.read


def reference(text: str, ids: Tensor, arriving: Arriving | None = None) -> Tensor:
    """Logits float64 of the model whose linears are swapped as ``text`` says."""
    model, peaks = llama().double(), inputs_of(llama().double(), ids)
    spec = Scheme.parse(text).spec
    assert spec.weight is not None
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, layer in linears.items():
        if name == "lm_head":
            continue
        layer.weight.data = coded(layer.weight.data, spec.weight)
        if spec.activation is not None:
            own, peak = spec.activation.tensor, None
            if not spec.activation.dynamic:  # calibrated on the same tokens, in float
                peak = peaks[name]
            layer.register_forward_pre_hook(
                lambda _, args, own=own, peak=peak: (
                    coded(arriving(args[0]) if arriving else args[0], own, peak),
                )
            )
    logits: Tensor = model(input_ids=ids).logits
    assert arriving is None or not arriving.left
    return logits
