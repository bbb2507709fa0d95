"""A float linear on the CPU by whichever of torch's libraries uses all of the processor."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.gemm import exact_dtype
from fxquant.numerics.kernels.table import unusual


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear``, up to the order of summation.

    torch takes MKL for fp32, which keeps to AVX2 on processors of some makers; where there is
    AVX-512, oneDNN uses it.
    """
    if without_onednn(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def without_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Why oneDNN's fp32 GEMM does not take the call."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.enabled:
        return "no CPU, or oneDNN is switched off"
    if any(each.dtype != torch.float32 for each in (x, weight)):
        return "torch takes oneDNN for other dtypes itself"
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return "without AVX-512 it is no faster"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch was built without it"
    if exact_dtype("cpu") != torch.float32:
        return "autocast or a reduced precision is on"
    return unusual((x, weight, bias))
