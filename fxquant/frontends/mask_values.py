"""What a traced graph makes of an attention mask, whatever its tokens and weights are.

The nodes that a mask comes from are computed: on tensors with numbers where they follow from the
attention mask and sizes alone, on fake ones, which have a shape and no numbers, where tokens or
weights take part. Of these nothing but sizes may be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from fxquant.ir.operands import op_name
from fxquant.structure.vocabulary import MOVES, is_a

# What writes into its first operand.
WRITES: Final = frozenset(
    {
        *("setitem", "iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor"),
        *("masked_fill_", "fill_", "zero_", "copy_", "add_", "sub_", "mul_", "div_", "triu_"),
        *("tril_", "index_put_", "index_fill_", "scatter_", "logical_and_", "logical_or_"),
    }
)
# A distance, window or chunk is a number beyond these; steps to the next token are not.
_STEP: Final = 2
# What masks add to scores that are not to be seen.
_LOWEST: Final = (
    -math.inf,
    *(torch.finfo(dtype).min for dtype in (torch.float16, torch.bfloat16, torch.float32)),
)


class _NotUnderstood(Exception):
    """The mask may follow from more than the attention mask and sizes."""


def mask_cone(gm: GraphModule, mask: Node) -> list[Node]:
    """The nodes that ``mask`` comes from, those that write into one of them included, in order."""
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    writes = [node for node in gm.graph.nodes if op_name(node) in WRITES]
    found: set[Node] = set()
    waiting = [mask]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
        if not waiting:
            waiting = [w for w in writes if w not in found and written_tensor(w) in found]
    return sorted(found, key=order.__getitem__)


def written_tensor(write: Node) -> Node:
    """What a node of WRITES writes into, views of it seen through."""
    node = write.args[0]
    while isinstance(node, Node) and is_a(node, *MOVES) and op_name(node) != "clone":
        node = node.args[0]
    assert isinstance(node, Node)
    return node


def mask_values(gm: GraphModule, mask: Node, attention_mask: Tensor) -> Tensor | None:
    """The value of ``mask`` for ``attention_mask`` int64 [batch, length] on the CPU.

    None where tokens or weights take part, a number that may be a distance, or what cannot be
    computed here.
    """
    values: dict[Node, Any] = {}
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        for node in mask_cone(gm, mask):
            values[node] = _value(gm, node, values, attention_mask, fakes)
    except Exception:  # whatever the model's own operators raise on what they are given here
        return None
    found = values[mask]
    return found if isinstance(found, Tensor) and not isinstance(found, FakeTensor) else None


def _value(
    gm: GraphModule, node: Node, values: dict[Node, Any], mask: Tensor, fakes: FakeTensorMode
) -> Any:
    if node.op == "placeholder":
        if node.target == "attention_mask":
            return mask.clone()
        with fakes:
            return torch.empty(mask.shape, dtype=torch.int64)
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return _faked({name: getattr(gm.get_submodule(owner), name)}, fakes)[name]
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        own = _faked({**dict(module.named_parameters()), **dict(module.named_buffers())}, fakes)
        with fakes, torch.no_grad():
            return torch.func.functional_call(module, own, args, kwargs)
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    if any(isinstance(each, FakeTensor) for each in tensors):
        if op_name(node) in WRITES and not isinstance(args[0], FakeTensor):
            raise _NotUnderstood
        with fakes, torch.no_grad():
            result = _call(node, args, kwargs)
    else:
        result = _call(node, args, kwargs)
    if not isinstance(result, FakeTensor):
        _check_numbers(node, result, mask.shape)
    return result


def _call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _faked(tensors: dict[str, Tensor], fakes: FakeTensorMode) -> dict[str, Tensor]:
    with fakes:
        return {
            name: nn.Parameter(fake, requires_grad=False)
            if isinstance(tensor, nn.Parameter)
            else fake
            for name, tensor in tensors.items()
            for fake in [torch.empty(tensor.shape, dtype=tensor.dtype)]
        }


def _check_numbers(node: Node, result: Any, shape: torch.Size) -> None:
    """Raise where a number stands in the node, or is its result, that may be a distance."""
    batch, length = shape
    sizes = (batch, length - 1, length, length + 1, batch * length)
    if type(result) is int and abs(result) > _STEP and result not in sizes:
        raise _NotUnderstood
    for number in _numbers((node.args, node.kwargs)):
        if number not in _LOWEST and (abs(number) > _STEP or int(number) != number):
            raise _NotUnderstood


def _numbers(value: Any) -> Iterator[int | float]:
    if type(value) in (int, float):
        yield value
    elif isinstance(value, slice):
        yield from _numbers((value.start, value.stop, value.step))
    elif isinstance(value, dict):
        yield from _numbers(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _numbers(each)
