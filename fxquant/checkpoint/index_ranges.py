"""Between which integers the elements of a tensor lie, where that is known: rows of tables.

Fakes do not see that ids, or what a graph makes of them, lie beyond the table that they are looked
up in: it would be a raw IndexError when the graph runs.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node

from fxquant.ir.functions import default_mask
from fxquant.ir.operands import op_name

Range = tuple[int, int]
_SAME = {
    *("view", "reshape", "flatten", "unsqueeze", "squeeze", "expand", "contiguous", "clone", "to"),
    *("long", "int", "getitem", "detach", "transpose", "permute", "repeat", "narrow", "select"),
}
_OF_TWO = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def range_of(
    node: Node, args: tuple[Any, ...], known: Mapping[Node, Range], length: int
) -> Range | None:
    """The range of what ``node`` makes of operands whose values are ``args``; None: not known.

    ``length``: tokens a row.
    """
    name = op_name(node)
    if node.target is default_mask:
        return 0, 1
    if name == "arange" and not node.kwargs.keys() - {"device", "dtype"}:
        ends = args if len(args) == 2 else (0, *args)
        if all(type(end) is int for end in ends) and len(ends) == 2:
            return ends[0], max(ends[0], ends[1] - 1)
    first = _known(node.args[0], known) if node.args else None
    if first is None or not node.op.startswith("call_"):
        return None
    if name in _SAME:
        return first
    if name == "cumsum":
        return min(first[0], length * first[0]), max(first[1], length * first[1])
    other = _known(node.args[1], known) if len(node.args) == 2 and not node.kwargs else None
    if name in _OF_TWO and other is not None:
        if name == "sub":
            return first[0] - other[1], first[1] - other[0]
        found = [_OF_TWO[name](one, two) for one in first for two in other]
        return min(found), max(found)
    return None


def _known(operand: Any, known: Mapping[Node, Range]) -> Range | None:
    if type(operand) is int:
        return operand, operand
    return known.get(operand) if isinstance(operand, Node) else None


def check_lookup(node: Node, table: Tensor, known: Mapping[Node, Range], vocabulary: int) -> None:
    """Raise IndexError where ``node`` looks up rows that the table [rows, width] does not have, or
    ids in a table of more rows than the graph says it takes."""
    found = _known(node.args[0], known) if node.args else None
    if found is None:
        return
    rows = table.shape[0]
    if found[0] < 0 or found[1] >= rows or (_is_of_ids(node.args[0]) and rows > vocabulary):
        raise IndexError(
            f"rows {found[0]} to {found[1]} of a table of {rows} rows, for a vocabulary of "
            f"{vocabulary}"
        )


def _is_of_ids(operand: Any) -> bool:
    """Whether it is the graph's input_ids, perhaps in another shape."""
    while isinstance(operand, Node) and op_name(operand) in _SAME and operand.args:
        operand = operand.args[0]
    if not isinstance(operand, Node) or operand.op != "placeholder":
        return False
    return operand.target == "input_ids"
