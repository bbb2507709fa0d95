"""Quantization on any grid the plain way, in float64: each linear's weight and input swapped.

Of fxquant only the names are used: what a scheme's text says, and the numbers of each grid.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.formats.table import GRIDS
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import TensorSpec
from tests.architectures import llama


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
    if name == "e4m3":
        shared = torch.tensor(whole / (448 * grid.reach)).float().double()
        wanted = (largest / grid.reach / shared).clamp(2.0**-6, 448)
        return on_levels(wanted, GRIDS["e4m3"]) * shared
    rule = name.removeprefix("e8m0").removeprefix("-") or "floor"
    return largest.clone().apply_(lambda value: power(value, grid, rule))


def on_levels(steps: Tensor, grid: Any) -> Tensor:
    """The nearest level, float64; of two at one distance that with the even code."""
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    even = [int(c) % 2 for c in grid.encode(levels.float()).view(torch.uint8).tolist()]
    distance = (steps[..., None] - levels).abs() + torch.tensor(even) * 1e-13
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
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / (last - first)).float().double()
        shift = (first - low / scale).round().clamp(first, last)
        codes = ((part.float() / scale.float()).double().round() + shift).clamp(first, last)
        parts.append((codes - shift) * scale)
    return torch.cat(parts, -1)


def inputs_of(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The largest magnitude that each linear of the float model reads."""
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: found.update({name: args[0].abs().max().double()})
            )
    model(input_ids=ids)
    return found


def reference(text: str, ids: Tensor) -> Tensor:
    """Logits float64 of the model whose linears are swapped as ``text`` says."""
    model, peaks = llama().double(), inputs_of(llama(), ids)
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
                lambda _, args, own=own, peak=peak: (coded(args[0], own, peak),)
            )
    logits: Tensor = model(input_ids=ids).logits
    return logits
