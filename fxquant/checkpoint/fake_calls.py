"""A node run on fakes: what the fakes let pass, and what would take long, is seen to here."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.checkpoint.size_numbers import SEQUENCES
from fxquant.ir.leaves import Conv1D, OnlineRotation
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import op_name
from fxquant.numerics.quantization import group_count
from fxquant.structure.vocabulary import PRODUCTS, Kind, is_a

ITEMS = 2**14  # in a tuple with all that it holds: splits, groups
_PIECES = {"unbind", "split", "chunk"}
_OF_BITS = {
    *(operator.and_, operator.or_, operator.xor, operator.invert, operator.lshift),
    *(operator.rshift, torch.bitwise_and),
}


def run_call(
    node: Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: Mapping[str, Tensor],
    leaves: Mapping[str, nn.Module],
) -> Any:
    """What ``node`` makes of its operands, fake; raises whatever torch does, and before anything
    that could take without bound."""
    if node.op == "get_attr":
        return tensors[str(node.target)]
    if node.op == "call_module":
        leaf = leaves[str(node.target)]
        if isinstance(leaf, nn.Linear | Conv1D | nn.LayerNorm | OnlineRotation):
            mixed = isinstance(leaf, nn.LayerNorm)
            own = (*leaf.parameters(recurse=False), *leaf.buffers(recurse=False))
            _check_dtypes((args[0], *own), mixed)
        return leaf(*args, **kwargs)
    if node.op == "call_method":
        if not isinstance(args[0], Tensor):
            raise TypeError(f"a method of a {type(args[0]).__name__}, which is no tensor")
        _guard(node, args, kwargs)
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    if function is OPS.grouped_gemm.default:
        return _grouped_gemm(*args)
    if function is OPS.grouped_code_gemm.default:
        return _grouped_code_gemm(*args)
    if function is OPS.int_matmul.default:
        _check_dtypes(args)
        return torch.matmul(*args).to(torch.int32)  # without its loop over the length
    if function is OPS.code_matmul.default:
        _check_dtypes(args[:2])
    _guard(node, args, kwargs)
    return function(*args, **kwargs)


def _grouped_gemm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight_sum: Tensor | None,
    weight_zero_point: Tensor | None,
    group_size: int,
) -> Tensor:
    """The operator's result without its loop over groups, which would take most of the time."""
    if type(group_size) is not int or group_size < 1 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"groups of {group_size} of {list(x.shape)} by {list(weight.shape)}")
    grid = (weight.shape[0], group_count(weight.shape[1], group_size))
    if any(
        each is not None and each.shape != grid for each in (scale, weight_sum, weight_zero_point)
    ):
        raise ValueError(f"a scale, sum or zero point that is not {list(grid)}")
    columns = min(group_size, x.shape[-1])
    first = OPS.int_gemm.default(x[..., :columns], weight[:, :columns], 0)
    shift = 0 if zero_point is None else zero_point * scale[:, 0]
    result: Tensor = first.to(torch.float32) * scale[:, 0] - shift
    return result


def _grouped_code_gemm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    zero_point: Tensor | None,
    weight_zero_point: Tensor | None,
    x_grid: str,
    weight_grid: str,
    x_group: int,
    weight_group: int,
) -> Tensor:
    """The operator's result without its loop over groups, as above."""
    rows, length = weight.shape[0], x.shape[-1]
    for scale, size, lead in (
        (x_scale, x_group, tuple(x.shape[:-1])),
        (weight_scale, weight_group, (rows,)),
    ):
        if type(size) is not int or size < 0 or bool(size) is (scale is None):
            raise ValueError(f"groups of {size!r}")
        if scale is not None and tuple(scale.shape) != (*lead, group_count(length, size)):
            raise ValueError(f"scales {list(scale.shape)} of groups of {size}")
    if not x_group and not weight_group:
        raise ValueError("no groups")
    sums: Tensor = OPS.code_gemm.default(x, weight, zero_point, None, x_grid, weight_grid)
    if weight_zero_point is not None:
        groups = group_count(length, weight_group) if weight_group else 1
        if tuple(weight_zero_point.shape) not in ((), (rows, 1), (rows, groups)):
            raise ValueError(f"zero points {list(weight_zero_point.shape)}")
    return sums.to(torch.float32)


def _guard(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise before a call does what could take without bound, or reach what is no tensor."""
    if node.target is getattr:
        if not isinstance(args[0], Tensor | torch.finfo):
            raise TypeError(f"an attribute of a {type(args[0]).__name__}, which is no tensor")
    elif node.target in _OF_BITS:
        if any(isinstance(each, Tensor) and each.is_floating_point() for each in args):
            raise TypeError("the bits of a float")
    elif is_a(node, Kind.LINEAR, *PRODUCTS):
        named = (value for name, value in kwargs.items() if name not in ("attn_mask", "mask"))
        _check_dtypes((*args[:3], *named))
    elif op_name(node) in _PIECES:
        _check_pieces(op_name(node), args, kwargs)


def _check_pieces(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise before a tensor is cut into more pieces than may be kept."""
    operands = (*args, *kwargs.values())
    tensors = [each for each in operands if isinstance(each, Tensor)]
    extents = [extent for each in tensors for extent in each.shape]
    if max(extents, default=0) <= ITEMS:
        return
    size, dim = _cut(name, args, kwargs)
    extent = tensors[0].shape[dim]
    count = extent if name == "unbind" else len(size) if isinstance(size, SEQUENCES) else size
    if name == "split" and type(size) is int:
        count = -(-extent // max(1, size))
    if count > ITEMS:
        raise OverflowError(f"{count} pieces")


def _cut(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
    """The size or number of the pieces, and the dimension, wherever they stand."""
    sizes = ("split_size", "split_size_or_sections", "chunks", "sections")
    rest = list(args[1:])
    size = next((kwargs[key] for key in sizes if key in kwargs), None)
    if name != "unbind" and size is None:
        size = rest.pop(0)
    return size, kwargs.get("dim", rest[0] if rest else 0)


def _check_dtypes(operands: Iterable[Any], mixed: bool = False) -> None:
    """Products want one dtype, which fakes do not see to; ``mixed``: or a first in half precision
    and float32 beside it."""
    found = [operand.dtype for operand in operands if isinstance(operand, Tensor)]
    half = (torch.float16, torch.bfloat16)
    if mixed and found[0] in half and set(found[1:]) == {torch.float32}:
        return
    if len(set(found)) > 1:
        raise TypeError(f"operands of {' and '.join(sorted(set(map(str, found))))}")
