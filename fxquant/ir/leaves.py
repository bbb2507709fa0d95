"""Leaf modules of ours that stand in graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxquant.schemes.specs import TensorSpec


class Conv1D(nn.Module):
    """``y = x W + b`` with the weight stored [K, N], as GPT-2 has it: the traced form of
    transformers' class of that name, whose parameters it takes as they are.

    ``nx`` is K, ``nf`` is N.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.nx, self.nf = weight.shape
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class QuantizedParameters(nn.Module):
    """Where a quantized site's codes, scales and bias live, at the path of the layer it replaces.

    Scales stay float32 and codes integer when the model changes dtype; only ``bias`` and ``like``
    (an empty tensor that holds the model's dtype) follow.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedParameters:
        for name, value in self._buffers.items():
            if value is not None:
                moved = fn(value)
                follows = name in ("bias", "like") or moved.dtype == value.dtype
                self._buffers[name] = moved if follows else value.to(moved.device)
        return self


class CodedLinear(nn.Linear):
    """A float linear whose codes a repair has chosen; the function is that of the float weight.

    ``codes`` holds the buffers of WeightCodes.tensors() (packed up to 4 bits), chosen
    for ``spec``; the quantize pass takes them instead of rounding to nearest. A pass that changes
    the weight installs a plain linear, and the choice is gone.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, spec: TensorSpec, codes: dict[str, Tensor]
    ) -> None:
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=False, device="meta")
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.spec = spec
        self.codes = QuantizedParameters(codes)


class FloatColumns(nn.Module):
    """Columns of the weight of ``site``, [N, k], that stay float beside its codes."""

    def __init__(self, site: str, weight: Tensor) -> None:
        super().__init__()
        self.site = site
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)


class Fp32Linear(nn.Module):
    """``F.linear`` in fp32 whatever the dtype of the operands, cast back to the input's dtype."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(device_type=x.device.type, enabled=False):
            y = nn.functional.linear(x.float(), self.weight.float(), bias)
        return y.to(x.dtype)


class OnlineRotation(nn.Module):
    """``x @ kron(left, right)`` over the last dimension, by the two factors; orthogonal."""

    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (self.left.shape[0], self.right.shape[0]))
        return torch.matmul(self.left.t(), torch.matmul(parts, self.right)).flatten(-2)


class OutlierIndex(nn.Module):
    """``index`` int64 [k], the columns that stay float; ``keep`` [K], 0 there and 1 elsewhere."""

    def __init__(self, index: Tensor, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.register_buffer("keep", keep)


class InverseScale(nn.Module):
    """Holds what an explicit multiplication multiplies by; it follows the model's dtype."""

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
