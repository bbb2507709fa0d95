"""A saved graph run on shapes alone, before any code is generated from it.

Every node is executed on fake tensors (no memory, no data) under a guard, so that a file whose
nodes do anything but compute tensors of a bounded size is refused with the node's name: arithmetic
of Python's own numbers that grows without bound, methods of what is no tensor, operands that do
not fit, a write into a stored tensor. ``size_rule`` takes the sizes that are tried for all others.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxquant.checkpoint.size_numbers import IN_PLACE, SEQUENCES, Bound, check_numbers
from fxquant.checkpoint.size_rule import Sizes, extents, sizes_up_to
from fxquant.errors import CheckpointError
from fxquant.ir.leaves import Conv1D
from fxquant.ir.levels import OPS
from fxquant.numerics.quantization import group_count

_DEPTH = 6
_ITEMS = 2**14  # in a tuple with all that it holds: splits, groups
_LEAST = 2**22  # elements that any graph may make
_PLAIN = (bool, float, type(None), torch.dtype, torch.device, torch.finfo)
_PRODUCTS = {
    *(nn.functional.linear, torch.matmul, torch.bmm, torch.mm, torch.baddbmm, torch.outer),
    *(operator.matmul, nn.functional.scaled_dot_product_attention),
}
_PIECES = {"unbind", "split", "chunk"}


@dataclass(frozen=True)
class _Stored:
    """What get_attr and call_module nodes may reach, fake, by path."""

    tensors: Mapping[str, Tensor]
    leaves: Mapping[str, nn.Module]

    @property
    def largest(self) -> int:
        """Elements that one value may have for a few tokens."""
        return 8 * max(_LEAST, *(value.numel() for value in self.tensors.values()), 0)

    @property
    def together(self) -> int:
        """Elements that all values in use at one time may have for a few tokens."""
        return 2 * self.largest + 4 * sum(value.numel() for value in self.tensors.values())


@torch.no_grad()
def rehearse(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    leaves: Mapping[str, nn.Module],
    max_positions: int | None,
) -> None:
    """Run ``graph`` on fakes; CheckpointError names the first node that does more than compute.

    Within a FakeTensorMode. What a node makes may grow with batch * length**2, as attention does,
    and no faster; each of its extents grows evenly, so that this holds at all sizes.

    Args:
        tensors, leaves: what get_attr and call_module nodes may reach, fake, by path.
        max_positions: the longest sequence, None if there is no limit.
    """
    stored = _Stored(tensors, leaves)
    sizes = sizes_up_to(max_positions)
    made: dict[Node, int] = {}
    found = [_Rehearsal(graph, stored, size, made).run() for size in sizes.tried]
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            _check_evenly(node, sizes, [each[node] for each in found])


def _check_evenly(node: Node, sizes: Sizes, found: list[tuple[Any, ...]]) -> None:
    reason = sizes.uneven(found)
    if reason:
        raise CheckpointError(
            f"node {node.name}: {node.op} {node.target}: {reason}; the sizes of a saved graph grow "
            "evenly with batch and length"
        )


class _Rehearsal:
    """One input size. ``made``: each node's elements at the first size, filled there."""

    def __init__(
        self, graph: Graph, stored: _Stored, size: tuple[int, int], made: dict[Node, int]
    ) -> None:
        self.graph, self.stored, self.size, self.made = graph, stored, size, made
        self.first = not made
        self.bounds: dict[Node, Bound] = {}
        self.known: dict[Any, Any] = {}

    def run(self) -> dict[Node, tuple[Any, ...]]:
        """The extents of what each node makes."""
        ids = torch.zeros(self.size, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": ids.clone()}
        kept = (*self.stored.tensors.values(), *inputs.values())
        versions = [value._version for value in kept]
        nodes = list(self.graph.nodes)
        last = {used: node for node in nodes for used in node.all_input_nodes}
        values: dict[Node, Any] = dict(zip(nodes, inputs.values(), strict=False))
        elements: dict[Node, int] = {}
        found: dict[Node, tuple[Any, ...]] = {}
        for node in nodes[len(inputs) : -1]:
            args, kwargs = map_arg((node.args, node.kwargs), lambda used: values[used])
            try:
                with _silent("torch._subclasses.fake_tensor"):  # it prints what it raises
                    values[node] = self._value(node, args, kwargs)
                elements[node] = self._count(node, values[node], sum(elements.values()))
            except Exception as error:  # whatever the file's operands make torch raise
                raise CheckpointError(
                    f"node {node.name}: {node.op} {node.target} cannot be computed from its "
                    f"operands: {type(error).__name__}: {str(error)[:200]}"
                ) from error
            found[node] = extents(values[node])
            for used in (node, *node.all_input_nodes):
                if last.get(used, node) is node:
                    elements.pop(used, None)
        if [value._version for value in kept] != versions:
            raise CheckpointError("a node writes into a stored tensor or an input")
        (result,) = nodes[-1].args
        _check_logits(values[result], self.size)
        return found

    def _value(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _check_value((args, tuple(kwargs.values())))
        self.bounds[node] = check_numbers(node, args, self.bounds)
        key = _alike(node, args, kwargs)
        if key is not None and key in self.known:
            return self.known[key]
        value = _run(node, args, kwargs, self.stored.tensors, self.stored.leaves)
        _forget_data(value)
        if key is not None:
            self.known[key] = value
        return value

    def _count(self, node: Node, value: Any, before: int) -> int:
        """Elements that ``node`` has made; raises where they are too many for the input."""
        found = _check_value(value)
        batch, length = self.size
        if node.op == "get_attr":
            return 0
        limit = max(1, self.made.get(node, 0)) * batch * length**2
        if self.first:
            self.made[node], limit = found, self.stored.largest
        if found > limit:
            raise OverflowError(f"{found} elements for {batch} x {length} tokens")
        if self.first and before + found > self.stored.together:
            raise OverflowError(f"{before + found} elements at a time, with those in use")
        return found


def _alike(node: Node, args: Any, kwargs: Any) -> Any:
    """What two nodes of one size have in common where they make tensors of one shape: blocks are
    alike, so most are computed once. None for one that has to run."""
    if node.op not in ("call_function", "call_method") or node.target in IN_PLACE:
        return None
    return (node.target, *_shapes((args, kwargs)))


def _shapes(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield (value.dtype, value.shape, value.stride())
    elif isinstance(value, dict):
        yield (dict, *value)
        for each in value.values():
            yield from _shapes(each)
    elif isinstance(value, SEQUENCES):
        yield (type(value), len(value))
        for each in value:
            yield from _shapes(each)
    elif isinstance(value, slice):
        yield from _shapes(("slice", value.start, value.stop, value.step))
    else:
        yield (type(value), repr(value))


def _forget_data(value: Any) -> None:
    """Fakes remember the number in ``torch.tensor(5)``; what a tensor holds may be no size."""
    if isinstance(value, FakeTensor):
        value.constant = None
    elif isinstance(value, tuple | list):
        for each in value:
            _forget_data(each)


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
        _check_pieces(str(node.target), args, kwargs)
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    if function is OPS.grouped_gemm.default:
        return _grouped_gemm(*args)
    if function is OPS.int_matmul.default:
        _check_dtypes(args)
        return torch.matmul(*args).to(torch.int32)  # without its loop over the length
    _guard(function, args, kwargs)
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


def _guard(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise before a function does what could take without bound, or reach what is no tensor."""
    if function is getattr:
        if not isinstance(args[0], Tensor | torch.finfo):
            raise TypeError(f"an attribute of a {type(args[0]).__name__}, which is no tensor")
    elif function in _PRODUCTS:
        _check_dtypes(args[:3])
    elif function in (torch.unbind, torch.split, torch.chunk):
        _check_pieces(function.__name__, args, kwargs)


def _check_pieces(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise before a tensor is cut into more pieces than may be kept."""
    if name not in _PIECES:
        return
    operands = (*args, *kwargs.values())
    tensors = [each for each in operands if isinstance(each, Tensor)]
    extents = [extent for each in tensors for extent in each.shape]
    if max(extents, default=0) <= _ITEMS:
        return
    size, dim = _cut(name, args, kwargs)
    extent = tensors[0].shape[dim]
    count = extent if name == "unbind" else len(size) if isinstance(size, SEQUENCES) else size
    if name == "split" and type(size) is int:
        count = -(-extent // max(1, size))
    if count > _ITEMS:
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
    """Products want one dtype, which fakes do not see to; ``mixed``: or half beside float32."""
    found = {operand.dtype for operand in operands if isinstance(operand, Tensor)}
    half = {torch.float16, torch.bfloat16}
    if len(found) > 1 and not (mixed and torch.float32 in found and len(found - half) == 1):
        raise TypeError(f"operands of {' and '.join(sorted(map(str, found)))}")


def _check_value(value: Any) -> int:
    """Elements of the tensors in a value; raises for what is not a bounded tensor, number or
    short sequence of them."""
    found = items = 0
    waiting = [(value, 0)]
    while waiting:
        each, depth = waiting.pop()
        if isinstance(each, Tensor):
            if each.layout is not torch.strided or each.device.type != "cpu":
                raise TypeError(f"a {each.layout} tensor on {each.device}")
            found += each.numel()
        elif isinstance(each, SEQUENCES) and depth < _DEPTH:
            items += len(each)
            if items > _ITEMS:
                raise OverflowError(f"more than {_ITEMS} items")
            waiting += [(item, depth + 1) for item in each]
        elif isinstance(each, slice):
            waiting += [(end, depth + 1) for end in (each.start, each.stop, each.step)]
        elif not (type(each) in (int, str, type(...)) or isinstance(each, _PLAIN)):
            raise TypeError(f"a {type(each).__name__}, which is no tensor and no number")
    return found


def _check_logits(value: Any, size: tuple[int, int]) -> None:
    known = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3
    if not (known and value.shape[:2] == size and value.shape[2]):
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value)
        raise CheckpointError(
            f"the output is {found} for input {list(size)}, not logits [batch, length, vocab]"
        )
