"""Which of a producer's channels stands where: found by running the graph on channel numbers.

Reshapes, splits, heads and their repetition need no rules of their own: the producer's output is
replaced by the number of each channel, products on the way pass it on, and what arrives at a linear
is, column by column, the number of the channel behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.ir.graph import device_of
from fxquant.ir.operands import op_name
from fxquant.run.execution import Executor
from fxquant.structure.scale_paths import ScalePath, attention_value
from fxquant.structure.vocabulary import MOVES, Kind, is_a

# Two digits of this base are exact in bfloat16 and reach further than any model is wide.
_BASE = 256


@torch.no_grad()
def channel_numbers(gm: GraphModule, paths: Iterable[ScalePath]) -> dict[Node, Tensor]:
    """For nodes on the paths, and rearrangements of them: int64 channel numbers in its shape.

    A batch of two rows of three tokens is run twice, once for each digit of the numbers.
    """
    channels = {path.producer.node: path.producer.channels for path in paths}
    wanted = _with_rearrangements({node for path in paths for node in path.nodes})
    instead = {
        node: _carry(node, operand) for path in paths for node, operand in path.through.items()
    }
    kept = {node: function for node, function in instead.items() if function is not None}
    executor = Executor(gm, instead=kept)
    ids = torch.zeros(2, 3, dtype=torch.int64, device=device_of(gm))
    numbers: dict[Node, Tensor] = {}
    for place in (_BASE, 1):

        def on_node(node: Node, value: Any, place: int = place) -> Any:
            if node in channels:
                digits = torch.arange(channels[node], device=value.device) // place % _BASE
                value = digits.to(value.dtype).expand(value.shape)
            if node in wanted and isinstance(value, Tensor):
                # What a shared node computes elsewhere need not be finite.
                digits = value.double().nan_to_num().to(torch.int64)
                numbers[node] = numbers.get(node, 0) + digits * place
            return value

        with torch.autocast(ids.device.type, enabled=False):
            executor.run(on_node, input_ids=ids)
    return numbers


def _with_rearrangements(nodes: set[Node]) -> set[Node]:
    found, todo = set(nodes), list(nodes)
    while todo:
        for user in todo.pop().users:
            if user not in found and is_a(user, Kind.CAST, *MOVES):
                found.add(user)
                todo.append(user)
    return found


def _carry(node: Node, operand: Node) -> Callable[..., Any] | None:
    """A stand-in that hands the operand on, for nodes that would change channel numbers."""
    if not op_name(node) or is_a(node, Kind.CAST, Kind.RELU, *MOVES):
        return None
    if operand in node.args:
        index = node.args.index(operand)
        first = attention_value(node) is not None
        return lambda *args, **_: _values(args, index) if first else args[index]
    key = next(key for key, value in node.kwargs.items() if value is operand)
    return lambda *_, **kwargs: kwargs[key]


def _values(args: tuple[Tensor, ...], index: int) -> Tensor:
    """V in place of P V: rows of P sum to 1, and V holds the same numbers at every position."""
    value = args[index]
    first = value.narrow(-2, 0, 1)
    if not torch.equal(first.expand_as(value), value):
        return torch.full_like(value, -1)
    return first.expand(*args[0].shape[:-1], value.shape[-1])


def columns_of(numbers: Tensor) -> Tensor | None:
    """int64 [K], the channel behind each column; None where it depends on the position."""
    rows = numbers.reshape(-1, numbers.shape[-1])
    return rows[0] if bool((rows == rows[0]).all()) and int(rows.min()) >= 0 else None


def leak(
    nodes: frozenset[Node], readers: frozenset[Node], numbers: Mapping[Node, Tensor], used: Tensor
) -> Node | None:
    """A node that reads some of the channels ``used`` beside ``readers``; None if there is none.

    ``nodes`` are those of the paths. Reading a shape is harmless, and so is taking other channels
    (queries and keys out of a fused projection whose values are scaled).
    """
    allowed = nodes | readers
    todo = sorted(nodes, key=lambda node: node.name)
    while todo:
        node = todo.pop()
        for user in node.users:
            if user in allowed or _reads_shape(user, node):
                continue
            if not is_a(user, *MOVES):
                return user
            found = numbers.get(user)
            if found is None or bool(torch.isin(used, found.reshape(-1)).any()):
                todo.append(user)
    return None


def _reads_shape(user: Node, node: Node) -> bool:
    if op_name(user) in ("type_as", "to", "expand_as", "view_as"):
        return user.args[0] is not node
    return is_a(user, Kind.SHAPE)
