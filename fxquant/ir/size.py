"""What a graph's weights occupy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.files.tensor_file import dtype_name
from fxquant.ir.coverage import block_matrices

Bytes = tuple[tuple[str, int], ...]
_SHORT = {
    **{"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"},
    **{"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"},
}


def bits_per_weight(gm: GraphModule) -> float:
    """Stored bits of all weights of the blocks over their number: codes, scales, zero points, and
    what stays in float.

    Columns that a repair keeps in float beside the codes count with what they occupy.
    Codes of up to 4 bits occupy 4 bits (two a byte); biases and static activation scales do not
    count. A graph without such weights: nan.
    """
    bits, weights = 0, 0
    for matrix in block_matrices(gm):
        weights += matrix.weights
        bits += sum(8 * t.numel() * t.element_size() for t in matrix.tensors)
    return bits / weights if weights else float("nan")


def bytes_by_dtype(tensors: Iterable[Tensor]) -> Bytes:
    """Bytes of different tensors, largest first; a tensor given twice counts once."""
    total: dict[str, int] = {}
    for tensor in {id(t): t for t in tensors}.values():
        name = short_dtype(tensor.dtype)
        total[name] = total.get(name, 0) + tensor.numel() * tensor.element_size()
    return tuple(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def short_dtype(dtype: torch.dtype) -> str:
    """``fp32``, ``bf16``, ``int8``."""
    name = dtype_name(dtype)
    return _SHORT.get(name, name)
