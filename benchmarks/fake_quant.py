"""What most tools do: swap every linear for one that rounds in float. The benchmark's yardstick."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class FakeQuantLinear(nn.Module):
    """Per-token dynamic int8 input and per-channel int8 weight, rounded and multiplied in float."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round() * scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        rounded = torch.clamp(torch.round(x / scale), -127, 127) * scale
        return nn.functional.linear(rounded, self.weight, self.bias)


def swap_linears(model: nn.Module) -> nn.Module:
    """A deep copy whose linears below ``layers`` are FakeQuantLinear."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in f".{name}":
            model.set_submodule(name, FakeQuantLinear(module))
    return model
