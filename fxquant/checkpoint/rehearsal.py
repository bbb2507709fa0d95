"""A saved graph run on shapes alone, before any code is generated from it.

Every node is executed on fake tensors (no memory, no data) under a guard, so that a file whose
nodes do anything but compute tensors of a bounded size is refused with the node's name: arithmetic
of Python's own numbers that grows without bound, methods of what is no tensor, operands that do
not fit, a write into a stored tensor. ``size_rule`` takes the sizes that are tried for all others.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxquant.checkpoint.fake_calls import ITEMS, run_call
from fxquant.checkpoint.fake_effects import Effects, watched_call
from fxquant.checkpoint.index_ranges import Range, check_lookup, range_of
from fxquant.checkpoint.size_numbers import IN_PLACE, SEQUENCES, Bound, check_numbers
from fxquant.checkpoint.size_rule import Sizes, extents, sizes_up_to
from fxquant.errors import CheckpointError
from fxquant.files.doors import printable
from fxquant.frontends.patching import exclusive
from fxquant.ir.graph import GraphInfo

_DEPTH = 6
_LEAST = 2**22  # elements that any graph may make
_PLAIN = (bool, float, type(None), torch.dtype, torch.device, torch.finfo)


@dataclass(frozen=True)
class _Stored:
    """What get_attr and call_module nodes may reach, fake, by path."""

    tensors: Mapping[str, Tensor]
    leaves: Mapping[str, nn.Module]
    vocabulary: int

    @property
    def largest(self) -> int:
        """Elements that one value may have for a few tokens."""
        return 8 * max(_LEAST, *(value.numel() for value in self.tensors.values()), 0)

    @property
    def together(self) -> int:
        """Elements that all values in use at one time may have for a few tokens."""
        return 2 * self.largest + 4 * sum(value.numel() for value in self.tensors.values())


@torch.no_grad()
@exclusive  # a trace in another thread replaces what torch's rules for shapes call
def rehearse(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    leaves: Mapping[str, nn.Module],
    facts: GraphInfo,
) -> None:
    """Run ``graph`` on fakes; CheckpointError names the first node that does more than compute.

    Within a FakeTensorMode. What a node makes may grow with batch * length**2, as attention does,
    and no faster; each of its extents grows evenly, so that this holds at all sizes. It is run
    without an attention mask too, which a graph may then not make.

    Args:
        tensors, leaves: what get_attr and call_module nodes may reach, fake, by path.
        facts: with the longest sequence, and the vocabulary that ids and logits are of.
    """
    stored = _Stored(tensors, leaves, facts.vocab_size)
    sizes = sizes_up_to(facts.max_positions)
    made: dict[Node, int] = {}
    found = [_Rehearsal(graph, stored, size, made).run() for size in sizes.tried]
    _Rehearsal(graph, stored, sizes.tried[0], made, masked=False).run()
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
        self,
        graph: Graph,
        stored: _Stored,
        size: tuple[int, int],
        made: dict[Node, int],
        masked: bool = True,
    ) -> None:
        self.graph, self.stored, self.size, self.made = graph, stored, size, made
        self.masked = masked
        self.first = not made
        self.bounds: dict[Node, Bound] = {}
        self.known: dict[Any, tuple[Any, Effects]] = {}
        self.ranges: dict[Node, Range] = {}
        # Whose values may be stored tensors or inputs, or views of them.
        self.kept = {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}

    def run(self) -> dict[Node, tuple[Any, ...]]:
        """The extents of what each node makes."""
        ids = torch.zeros(self.size, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": ids.clone() if self.masked else None}
        given = (each for each in inputs.values() if each is not None)
        kept = (*self.stored.tensors.values(), *given)
        versions = [value._version for value in kept]
        nodes = list(self.graph.nodes)
        last = {used: node for node in nodes for used in node.all_input_nodes}
        values: dict[Node, Any] = dict(zip(nodes, inputs.values(), strict=False))
        for node, top in zip(nodes, (self.stored.vocabulary - 1, 1), strict=False):
            self.ranges[node] = (0, top)
        elements: dict[Node, int] = {}
        total = 0  # of the elements of values that are still needed
        found: dict[Node, tuple[Any, ...]] = {}
        for node in nodes[len(inputs) : -1]:
            args, kwargs = map_arg((node.args, node.kwargs), lambda used: values[used])
            try:
                with _silent("torch._subclasses.fake_tensor"):  # it prints what it raises
                    values[node] = self._value(node, args, kwargs)
                elements[node] = self._count(node, values[node], total)
            except Exception as error:  # whatever the file's operands make torch raise
                said = printable(" ".join(str(error).split())[:200])
                raise CheckpointError(
                    f"node {node.name}: {node.op} {node.target} cannot be computed from its "
                    f"operands: {type(error).__name__}: {said}"
                ) from error
            found[node] = extents(values[node])
            total += elements[node]
            for used in (node, *node.all_input_nodes):
                if last.get(used, node) is node:
                    total -= elements.pop(used, 0)
        if [value._version for value in kept] != versions:
            raise CheckpointError("a node writes into a stored tensor or an input")
        (result,) = nodes[-1].args
        _check_logits(values[result], (*self.size, self.stored.vocabulary))
        return found

    def _value(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _check_value((args, tuple(kwargs.values())))
        self.bounds[node] = check_numbers(node, args, self.bounds)
        self._check_indices(node, args)
        key = _alike(node, args, kwargs)
        done = None if key is None else self.known.get(key)
        if done is None:
            call = partial(run_call, node, args, kwargs, self.stored.tensors, self.stored.leaves)
            done = watched_call(call, (args, kwargs))
            _forget_data(done[0])
            if key is not None:
                self.known[key] = done
        value, effects = done
        self._follow(node, effects)
        return value

    def _follow(self, node: Node, effects: Effects) -> None:
        """Whether a view is one of a stored tensor is told by the nodes: of calls that are alike
        only one is made."""
        reached = node.args[:1] if node.target in IN_PLACE else node.all_input_nodes
        if self.kept.isdisjoint(each for each in reached if isinstance(each, Node)):
            return
        if effects.writes:
            raise TypeError("writes into what may be a stored tensor or an input; clone it before")
        if effects.shares:
            self.kept.add(node)

    def _check_indices(self, node: Node, args: tuple[Any, ...]) -> None:
        found = range_of(node, args, self.ranges, self.size[1])
        if found is not None:
            self.ranges[node] = found
        table = None
        if node.op == "call_module":
            leaf = self.stored.leaves[str(node.target)]
            table = leaf.weight if isinstance(leaf, nn.Embedding) else None
        elif node.target is nn.functional.embedding and len(args) > 1:
            table = args[1]
        if isinstance(table, Tensor):
            check_lookup(node, table, self.ranges, self.stored.vocabulary)

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
            if items > ITEMS:
                raise OverflowError(f"more than {ITEMS} items")
            waiting += [(item, depth + 1) for item in each]
        elif isinstance(each, slice):
            waiting += [(end, depth + 1) for end in (each.start, each.stop, each.step)]
        elif not (type(each) in (int, str, type(...)) or isinstance(each, _PLAIN)):
            raise TypeError(f"a {type(each).__name__}, which is no tensor and no number")
    return found


def _check_logits(value: Any, size: tuple[int, int, int]) -> None:
    known = isinstance(value, Tensor) and value.is_floating_point()
    shape = tuple(value.shape) if known else ()
    if len(shape) != 3 or shape[:2] != size[:2] or shape[2] < size[2]:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value)
        raise CheckpointError(
            f"the output is {found} for input {list(size[:2])}, not logits [batch, length, vocab] "
            f"of a vocabulary of {size[2]}"
        )
