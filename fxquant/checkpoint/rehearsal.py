"""A loaded graph run once on shapes alone, before any code is generated from it.

Every node is executed on fake tensors (no memory, no data) under a guard, so that a file whose
nodes do anything but compute tensors of a bounded size is refused with the node's name: arithmetic
of Python's own numbers that grows without bound, methods of what is no tensor, operands that do
not fit, a write into a stored tensor.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxquant.errors import CheckpointError
from fxquant.ir.leaves import Conv1D
from fxquant.ir.levels import OPS
from fxquant.numerics.quantization import group_count

BATCH, LENGTH = 2, 5
_BITS = 256  # of a product of sizes: five of them have less
_EXPONENT = 64
_ITEMS = 2**14  # in a tuple: splits, groups
_LEAST = 2**22  # elements that any graph may make
_SEQUENCES = (torch.Size, tuple, list)
_PLAIN = (bool, float, type(None), torch.dtype, torch.device, torch.finfo)
_NUMBERS = (int, float, bool)
_PRODUCTS = {
    *(nn.functional.linear, torch.matmul, torch.bmm, torch.mm, torch.baddbmm, torch.outer),
    *(operator.matmul, nn.functional.scaled_dot_product_attention),
}
_GROWING = (operator.mul, operator.pow, operator.lshift)


@torch.no_grad()
def rehearse(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    leaves: Mapping[str, nn.Module],
    max_positions: int | None,
) -> None:
    """Run ``graph`` on fakes; CheckpointError names the first node that does more than compute.

    Within a FakeTensorMode.

    Args:
        tensors, leaves: what get_attr and call_module nodes may reach, fake, by path.
        max_positions: the longest sequence, None if there is no limit.
    """
    length = min(LENGTH, max_positions or LENGTH)
    ids = torch.zeros(BATCH, length, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": ids.clone()}
    largest = max((value.numel() for value in tensors.values()), default=0)
    limit = 8 * max(_LEAST, largest)
    stored = (*tensors.values(), *inputs.values())
    versions = [value._version for value in stored]
    values: dict[Node, Any] = dict(zip(graph.nodes, inputs.values(), strict=False))
    for node in list(graph.nodes)[len(inputs) : -1]:
        args, kwargs = map_arg((node.args, node.kwargs), lambda used: values[used])
        try:
            with _silent("torch._subclasses.fake_tensor"):  # it prints what it raises
                values[node] = _run(node, args, kwargs, tensors, leaves)
            _check_value(values[node], limit)
        except Exception as error:  # whatever the file's operands make torch raise
            raise CheckpointError(
                f"node {node.name}: {node.op} {node.target} cannot be computed from its operands: "
                f"{type(error).__name__}: {str(error)[:200]}"
            ) from error
    if [value._version for value in stored] != versions:
        raise CheckpointError("a node writes into a stored tensor or an input")
    (result,) = next(iter(reversed(graph.nodes))).args
    _check_logits(values[result], length)


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    def nothing(_: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger(name)
    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)


def _run(
    node: Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: Mapping[str, Tensor],
    leaves: Mapping[str, nn.Module],
) -> Any:
    if node.op == "get_attr":
        return tensors[str(node.target)]
    if node.op == "call_module":
        leaf = leaves[str(node.target)]
        if isinstance(leaf, nn.Linear | Conv1D | nn.LayerNorm):
            mixed = isinstance(leaf, nn.LayerNorm)
            _check_dtypes((args[0], *leaf.parameters(recurse=False)), mixed)
        return leaf(*args, **kwargs)
    if node.op == "call_method":
        if not isinstance(args[0], Tensor):
            raise TypeError(f"a method of a {type(args[0]).__name__}, which is no tensor")
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    if function is OPS.grouped_gemm.default:
        return _grouped_gemm(*args)
    _guard(function, args)
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


def _guard(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Raise before a function does what could take without bound, or reach what is no tensor."""
    if function is getattr:
        if not isinstance(args[0], Tensor | torch.finfo):
            raise TypeError(f"an attribute of a {type(args[0]).__name__}, which is no tensor")
    elif function in _PRODUCTS:
        _check_dtypes(args[:3])
    elif getattr(function, "__module__", "") == "_operator" and not any(
        isinstance(operand, Tensor) for operand in args
    ):
        _guard_numbers(function, args)


def _check_dtypes(operands: Iterable[Any], mixed: bool = False) -> None:
    """Products want one dtype, which fakes do not see to; ``mixed``: or half beside float32."""
    found = {operand.dtype for operand in operands if isinstance(operand, Tensor)}
    half = {torch.float16, torch.bfloat16}
    if len(found) > 1 and not (mixed and torch.float32 in found and len(found - half) == 1):
        raise TypeError(f"operands of {' and '.join(sorted(map(str, found)))}")


def _guard_numbers(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """For operators on no tensor: pick from and join short sequences, count with short numbers."""
    if all(type(operand) in _NUMBERS for operand in args):
        if function in _GROWING and all(type(operand) is not float for operand in args):
            base, other = (int(operand) for operand in args)
            bits = base.bit_length() + other.bit_length()
            if function is not operator.mul:
                bits = base.bit_length() * other if function is operator.pow else 0
                bits = _BITS + 1 if abs(other) > _EXPONENT else bits + abs(other)
            if bits > _BITS:
                raise OverflowError(f"{function.__name__}{args} of Python's numbers")
        return
    sequence = isinstance(args[0], _SEQUENCES)
    if function is operator.getitem and sequence and isinstance(args[1], int | slice):
        return
    if function is operator.add and sequence and isinstance(args[1], _SEQUENCES):
        return
    if function in (operator.eq, operator.ne):
        return
    kinds = ", ".join(type(operand).__name__ for operand in args)
    raise TypeError(f"{function.__name__} of {kinds}")


def _check_value(value: Any, limit: int, depth: int = 0) -> None:
    """Raise for a value that is not a bounded tensor, number or short sequence of them."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.device.type != "cpu":
            raise TypeError(f"a {value.layout} tensor on {value.device}")
        if value.numel() > limit:
            raise OverflowError(f"{value.numel()} elements for {BATCH} x {LENGTH} tokens")
    elif isinstance(value, _SEQUENCES) and depth < 3:
        if len(value) > _ITEMS:
            raise OverflowError(f"{len(value)} items")
        for item in value:
            _check_value(item, limit, depth + 1)
    elif type(value) is int:
        if value.bit_length() > _BITS:
            raise OverflowError(f"a number of {value.bit_length()} bits")
    elif not isinstance(value, _PLAIN):
        raise TypeError(f"a {type(value).__name__}, which is no tensor and no number")


def _check_logits(value: Any, length: int) -> None:
    known = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3
    if not (known and value.shape[:2] == (BATCH, length) and value.shape[2]):
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value)
        raise CheckpointError(
            f"the output is {found} for input {[BATCH, length]}, not logits [batch, length, vocab]"
        )
