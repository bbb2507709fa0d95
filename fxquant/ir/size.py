"""What a graph's weights occupy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.ir.graph import info
from fxquant.ir.leaves import FloatColumns, QuantizedParameters

Bytes = tuple[tuple[str, int], ...]
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


def bits_per_weight(gm: GraphModule) -> float:
    """Stored bits of the block linears' weights over their number: codes, scales, zero points.

    Columns that a repair keeps in float beside the codes count with what they occupy.
    Codes of up to 4 bits occupy 4 bits (two a byte); biases and static activation scales do not
    count. A graph without such sites: nan.
    """
    columns = {m.site: m.weight for m in gm.modules() if isinstance(m, FloatColumns)}
    bits, weights = 0, 0
    for site in info(gm).sites:
        if site.role == "linear":
            weights += site.shape[0] * site.shape[1]
            beside = [columns[site.path]] if site.path in columns else []
            tensors = (*_weight_tensors(gm, site.path), *beside)
            bits += sum(8 * t.numel() * t.element_size() for t in tensors)
    return bits / weights if weights else float("nan")


def _weight_tensors(gm: GraphModule, path: str) -> list[Tensor]:
    module = gm.get_submodule(path)
    names = ["weight"]
    if isinstance(module, QuantizedParameters):
        names += ["weight_scale", "weight_zero_point"]
    found = (getattr(module, name, None) for name in names)
    return [value for value in found if isinstance(value, Tensor)]


def bytes_by_dtype(tensors: Iterable[Tensor]) -> Bytes:
    """Bytes of different tensors, largest first; a tensor given twice counts once."""
    total: dict[str, int] = {}
    for tensor in {id(t): t for t in tensors}.values():
        name = short_dtype(tensor.dtype)
        total[name] = total.get(name, 0) + tensor.numel() * tensor.element_size()
    return tuple(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def short_dtype(dtype: torch.dtype) -> str:
    """``fp32``, ``bf16``, ``int8``."""
    name = str(dtype).removeprefix("torch.")
    return _SHORT.get(name, name)
