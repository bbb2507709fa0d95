"""Quantization the plain way, to compare with: each linear swapped for a module, all in float64.

Written apart from fxquant, of which it imports nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Plain:
    """What the reference does at each linear; ``activation`` None: weights only."""

    weight_bits: int = 8
    weight_symmetric: bool = True
    weight_group: int | None = None
    activation: Literal["tensor", "token", "static"] | None = None
    symmetric: bool = True


def parameters_from_range(
    low: Tensor, high: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point: symmetric to +-(2^(bits-1) - 1), affine to the whole code range."""
    if symmetric:
        return torch.maximum(-low, high) / (2 ** (bits - 1) - 1), torch.zeros_like(low)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return scale, torch.round(-(2 ** (bits - 1)) - low / scale)


def codes_of(x: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> Tensor:
    lowest = -(2 ** (bits - 1)) + int(symmetric)
    return torch.clamp(torch.round(x / scale) + zero, lowest, 2 ** (bits - 1) - 1)


def quantized_weight(weight: Tensor, plain: Plain) -> Tensor:
    """float64 [N, K] after quantization and back; one scale for each row, or group of a row."""
    size = plain.weight_group or weight.shape[1]
    groups = []
    for group in weight.double().split(size, dim=1):
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        bits, symmetric = plain.weight_bits, plain.weight_symmetric
        scale, zero = parameters_from_range(low, high, bits, symmetric)
        groups.append((codes_of(group, scale, zero, bits, symmetric) - zero) * scale)
    return torch.cat(groups, dim=1)


class PlainLinear(nn.Module):
    """``x_hat @ w_hat.T + bias`` in float64; keeps the codes of its last input."""

    def __init__(self, weight: Tensor, bias: Tensor | None, plain: Plain) -> None:
        super().__init__()
        self.plain = plain
        self.weight = quantized_weight(weight.detach(), plain)
        self.bias = None if bias is None else bias.detach().double()
        self.range: tuple[Tensor, Tensor] | None = None
        self.codes: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        value = x.double()
        if self.plain.activation is not None:
            scale, zero = parameters_from_range(*self.input_range(value), 8, self.plain.symmetric)
            self.codes = codes_of(value, scale, zero, 8, self.plain.symmetric)
            value = (self.codes - zero) * scale
        y = value @ self.weight.T
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def input_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.plain.activation == "token":
            return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        if self.plain.activation == "static":
            assert self.range is not None
            return self.range
        return x.amin(), x.amax()


def blocks_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    return next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))


def linears_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    prefix, blocks = blocks_of(model)
    return {
        f"{prefix}.{name}": module
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def input_ranges(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Smallest and largest input of each linear over the attended tokens of all batches."""
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    mask = torch.empty(0)

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].double().reshape(mask.numel(), -1)[mask.reshape(-1) == 1]
            low, high = ranges.get(name, (x.amin(), x.amax()))
            ranges[name] = torch.minimum(low, x.amin()), torch.maximum(high, x.amax())

        return module.register_forward_pre_hook(hook)

    handles = [watch(name, module) for name, module in linears_of(model).items()]
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"]
            model(**batch)
    for handle in handles:
        handle.remove()
    return ranges


def swap(
    model: PreTrainedModel, plain: Plain, calibration: Sequence[dict[str, Tensor]] = ()
) -> PreTrainedModel:
    """A copy of ``model`` whose decoder blocks' linears are PlainLinears."""
    swapped = copy.deepcopy(model)
    ranges = input_ranges(swapped, calibration)
    for name, linear in linears_of(swapped).items():
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        module = PlainLinear(weight.T if isinstance(linear, Conv1D) else weight, bias, plain)
        module.range = ranges.get(name)
        swapped.set_submodule(name, module)
    return swapped


def codes(swapped: PreTrainedModel) -> dict[str, Tensor]:
    """The input codes of each linear in the last forward."""
    return {
        name: module.codes
        for name, module in swapped.named_modules()
        if isinstance(module, PlainLinear) and module.codes is not None
    }


DYNAMIC = Plain(activation="tensor")
PLAIN = {
    "w8": Plain(),
    "w8-asym": Plain(weight_symmetric=False),
    "w4": Plain(weight_bits=4),
    "w4-g12-asym": Plain(weight_bits=4, weight_group=12, weight_symmetric=False),
    "w8a8-dynamic": DYNAMIC,
    "w8a8-dynamic-asym": replace(DYNAMIC, symmetric=False),
    "w8a8-dynamic-token": Plain(activation="token"),
    "w8a8-dynamic-token-asym": Plain(activation="token", symmetric=False),
    "w8a8-static:absmax": Plain(activation="static"),
    "w8a8-static-asym:absmax": Plain(activation="static", symmetric=False),
    "w8-asym/a8-static-asym:absmax": Plain(
        weight_symmetric=False, activation="static", symmetric=False
    ),
    "w4-g12/a8-dynamic-token": Plain(weight_bits=4, weight_group=12, activation="token"),
    "w4-g12-asym/a8-dynamic-token-asym": Plain(
        weight_bits=4, weight_group=12, weight_symmetric=False, activation="token", symmetric=False
    ),
}


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in dB: 10 log10(sum ref^2 / sum (ref - approx)^2)."""
    signal = reference.detach().double().square().sum()
    noise = (reference.detach().double() - approximation.double()).square().sum()
    return float(10 * torch.log10(signal / noise))
