"""Which implementation of a fused operator takes a call, by operator and device, and why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.numerics.kernels import cpu, cuda, scaled_mm


@dataclass(frozen=True)
class Implementation:
    """One way to run a fused operator.

    ``why_not`` takes the operator's operands and says why this one does not take them, "" if it
    does; ``run`` takes the same. ``exact``: whether it gives the composition's very bits.
    """

    operator: str
    device: str
    name: str
    why_not: Callable[..., str]
    run: Callable[..., Any]
    exact: bool = True


# The first row of an operator and device that takes a call runs it.
TABLE = (
    Implementation("quantize_rows", "cpu", "row blocks", cpu.always, cpu.quantize_rows),
    Implementation("quantize_static", "cpu", "row blocks", cpu.always, cpu.quantize_static),
    Implementation("int_linear", "cpu", "oneDNN int8", cpu.without_int8, cpu.int8_linear),
    Implementation("int_linear", "cpu", "fp32 sums", cpu.without_float_sums, cpu.float_linear),
    Implementation("grouped_int_linear", "cpu", "oneDNN int8", cpu.without_int8, cpu.int8_grouped),
    Implementation("dequant_linear", "cpu", "groups as views", cpu.without_views, cpu.dequantized),
    Implementation("quantize_rows", "cuda", "triton", cuda.without_rows, cuda.quantize_rows),
    Implementation("quantize_static", "cuda", "triton", cuda.without_static, cuda.quantize_static),
    Implementation("int_linear", "cuda", "triton", cuda.without_gemm, cuda.int_linear),
    Implementation(
        "grouped_int_linear", "cuda", "triton", cuda.without_groups, cuda.grouped_int_linear
    ),
    Implementation("int_product", "cuda", "triton", cuda.without_product, cuda.int_product),
    Implementation(
        "dequant_linear", "cuda", "triton and cuBLAS", cuda.without_dequantize, cuda.dequantized
    ),
    *(
        Implementation(
            *("code_linear", device, "torch._scaled_mm"),
            *(scaled_mm.without_scaled_mm, scaled_mm.code_linear),
            exact=False,
        )
        for device in ("cpu", "cuda")
    ),
)


def implementation(operator: str, *operands: Any) -> Implementation | None:
    """The row that takes the call; None where the composition of plain operators runs it."""
    if unusual(operands):
        return None
    device = operands[0].device.type
    for row in TABLE:
        if row.operator == operator and row.device == device and not row.why_not(*operands):
            return row
    return None


def reasons(operator: str, *operands: Any) -> list[tuple[str, str]]:
    """Each row of the operator on the operands' device, with why it does not take the call."""
    device = operands[0].device.type
    rows = [row for row in TABLE if row.operator == operator and row.device == device]
    whole = unusual(operands)
    return [(row.name, whole or row.why_not(*operands)) for row in rows]


def unusual(operands: tuple[Any, ...]) -> str:
    """Why a call is none for a fast implementation at all; "" for plain tensors that run now."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return "a compiler or another mode looks at every operator"
    for each in operands:
        if isinstance(each, Tensor):
            if type(each) not in (Tensor, nn.Parameter):
                return f"a {type(each).__name__} is no plain tensor"
            if each.requires_grad and torch.is_grad_enabled():
                return "a gradient is asked for"
    return ""
