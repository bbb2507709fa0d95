"""The graph's list of nodes after each pass of its history, and what one pass changed in it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple

from torch.fx import GraphModule

from fxquant.analysis.inspection.formulas import operator_name
from fxquant.analysis.inspection.printer import (
    WIDTH,
    Columns,
    Names,
    Row,
    Section,
    lay_out,
    rows,
    sections,
)
from fxquant.analysis.inspection.shapes import UNKNOWN, Value
from fxquant.analysis.inspection.suggest import unknown
from fxquant.errors import InspectionError
from fxquant.ir.graph import info
from fxquant.ir.records import NodeText, PassRecord
from fxquant.ir.snapshot import describe, undo

_WORD = re.compile(r"\w+")


class History:
    """Listings of a graph and of its past; shapes are found when first asked for.

    Attributes:
        states: the nodes before the first pass, and after each pass.
    """

    def __init__(self, gm: GraphModule) -> None:
        facts = info(gm)
        self.records: tuple[PassRecord, ...] = facts.history
        self._blocks = facts.blocks
        self._sites = tuple(site.path for site in facts.sites)
        states = [describe(gm)]
        for record in reversed(self.records):
            try:
                states.append(undo(states[-1], record.delta))
            except ValueError as error:
                raise InspectionError(
                    f"the graph was changed outside of a pass after {record.name}: {error}; "
                    "its history cannot be shown"
                ) from error
        self.states: tuple[list[NodeText], ...] = tuple(reversed(states))
        self._by_name = [{node.name: node for node in state} for state in self.states]
        self.nodes = {name: node for state in self._by_name for name, node in state.items()}

    def index(self, name: str) -> int:
        """Position of the pass called ``name`` (or spelled so); the last one if it ran twice.

        Raises InspectionError listing the passes that ran.
        """
        for index in range(len(self.records) - 1, -1, -1):
            if name in (self.records[index].name, self.records[index].spelling):
                return index
        raise unknown("pass", name, [record.name for record in self.records])

    def sections(self, state: int) -> list[Section]:
        """The blocks of a state, and what stands before and behind them."""
        return sections(self.states[state], self._blocks)

    def names(self, section: Section, values: Mapping[str, Value], state: int = -1) -> Names:
        return Names(self._by_name[state], values, self._sites, section.path)

    def rows(self, section: Section, values: Mapping[str, Value], state: int = -1) -> list[Row]:
        return rows(section, self.names(section, values, state), values)

    def born(self, node: NodeText) -> int:
        """The first state that holds the node: a pass may give a new node an old one's name."""
        return next(
            index
            for index, state in enumerate(self._by_name)
            if node.name in state and state[node.name].tag.origin == node.tag.origin
        )

    def sources(self, node: NodeText) -> list[NodeText]:
        """The nodes that it was made from, as they stood before the pass that made it."""
        before = self._by_name[max(self.born(node) - 1, 0)]
        return [before[name] for name in node.tag.made_from if name in before]

    def past_values(self, live: Mapping[str, Value]) -> dict[str, Value]:
        """Values of nodes that are gone, from those that replaced them and from their operands."""
        found = dict(live)
        for node in reversed(list(self.nodes.values())):
            if node.tag.replaces is not None and node.name in found:
                found.setdefault(node.tag.replaces, found[node.name])
        for node in self.nodes.values():
            if node.name not in found and node.target == "fxquant.dequantize":
                codes, like = (found.get(node.args[i][1:], UNKNOWN) for i in (0, 4))
                found[node.name] = Value(codes.shape, like.dtype)
        return found


def diff(history: History, index: int, live: Mapping[str, Value]) -> str:
    """What the pass at ``index`` changed: a unified diff of the listing, block by block.

    Blocks that changed alike are shown once.
    """
    record, values = history.records[index], history.past_values(live)
    sides = [{s.title: s for s in history.sections(state)} for state in (index, index + 1)]
    shown: dict[str, tuple[list[str], list[str]]] = {}
    for title in dict.fromkeys((*sides[0], *sides[1])):
        old, new = (
            history.rows(side[title], values, index + late) if title in side else []
            for late, side in enumerate(sides)
        )
        columns = Columns.fitting([*old, *new], WIDTH - 1)  # behind "+" and "-"
        lines = _unified(lay_out(old, columns), lay_out(new, columns))
        if lines:
            key = _canonical(_unified(_plain(old), _plain(new)), history.nodes)
            shown.setdefault(key, (lines, []))[1].append(title)
    head = [f"--- before {record.spelling}", f"+++ after {record.spelling}"]
    for lines, titles in shown.values():
        also = f" (and alike: {_span(titles[1:])})" if len(titles) > 1 else ""
        head += [f"# {titles[0]}{also}", *lines]
    if record.delta.leaves:
        head += [f"# other parameters in: {leaf}" for leaf in record.delta.leaves]
    if not shown and not record.delta.leaves:
        head.append("# no line changed")
    return "\n".join(head)


def _unified(old: Sequence[str], new: Sequence[str]) -> list[str]:
    return list(difflib.unified_diff(old, new, n=2, lineterm=""))[2:]


def _plain(found: Sequence[Row]) -> list[str]:
    return ["\t".join(astuple(row)) for row in found]


def _canonical(lines: Sequence[str], nodes: Mapping[str, NodeText]) -> str:
    """The lines with the nodes that belong to no site named by their first appearance."""
    loose = {
        operator_name(node.name)
        for node in nodes.values()
        if node.tag.site is None and node.op in ("call_function", "call_method")
    }
    seen: dict[str, str] = {}

    def renamed(found: re.Match[str]) -> str:
        word = found.group()
        return seen.setdefault(word, f"#{len(seen)}") if word in loose else word

    text = []
    for line in lines:
        if not line.startswith("@@"):
            site, node, operator, operands, *rest = line.split("\t")
            names = (_WORD.sub(renamed, part) for part in (node, operands))
            text.append("\t".join((site, operator, *names, *rest)))
    return "\n".join(text)


def _span(titles: Sequence[str]) -> str:
    return titles[0] if len(titles) == 1 else f"{titles[0]} .. {titles[-1]}, {len(titles)} blocks"
