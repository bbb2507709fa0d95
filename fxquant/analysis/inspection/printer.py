"""The one printer: nodes in words become an aligned listing, one line a node, without addresses.

Buffers, sizes and dtypes stand inside the operands that read them; so do the parts of a pair,
flattened scales, indexing and ``contiguous``. A weight's integer codes keep their line.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fxquant.analysis.inspection.formulas import formula, operator_name
from fxquant.analysis.inspection.shapes import UNKNOWN, Value
from fxquant.ir.blocks import block_of, within
from fxquant.ir.records import NodeText

WIDTH = 100
_GAP = "  "
_NODE = 12  # longer names lean into the site's column
_REFERENCE = re.compile(r"%(\w+)")
# What the items of an operator that gives several are called.
_PARTS = {
    "fxquant.choose_qparams": ("scale", "zero_point"),
    "fxquant.quantize_rows": ("codes", "scale", "zero_point", "nan"),
    "fxquant.quantize_static": ("codes", "nan"),
}
_INLINED = ("getitem", "contiguous")


@dataclass(frozen=True)
class Row:
    """One line of a listing."""

    site: str
    node: str
    operator: str
    operands: str
    dtype: str
    shape: str


HEAD = Row("site", "node", "operator", "operands", "dtype", "shape")


@dataclass(frozen=True)
class Section:
    """The nodes of one decoder block, or those before or behind the blocks (path "")."""

    title: str
    path: str
    nodes: tuple[NodeText, ...]


def sections(nodes: Sequence[NodeText], blocks: Sequence[str]) -> list[Section]:
    """The list cut at the decoder blocks, in order of first appearance."""
    found: dict[str, list[NodeText]] = {}
    current = ""
    last = blocks[-1] if blocks else ""
    for node in nodes:
        own = _block_of(node, blocks)
        if own is None and node.op == "output":
            own = "end"
        if own is None:
            # Unknown scope: a pass without one made it, next to what it belongs to.
            own = current if node.tag.origin != "trace" else ("end" if last in found else "start")
        current = own
        found.setdefault(own, []).append(node)
    titles = {"start": "before the blocks", "end": "behind the blocks"}
    return [
        Section(titles.get(key, key), "" if key in titles else key, tuple(part))
        for key, part in found.items()
    ]


def _block_of(node: NodeText, blocks: Sequence[str]) -> str | None:
    """The decoder block that a node belongs to: by its site, its scope, or what it calls."""
    places = [node.tag.site or node.tag.scope]
    if node.op in ("call_module", "get_attr"):
        places.append(node.target)
    return next((block for place in places if (block := block_of(place, blocks))), None)


class Names:
    """How nodes are called in the listing of one block.

    Args:
        nodes: every node of the graph, and of earlier states of it, by name.
        values: what is known of them.
        sites: paths of all sites.
        block: path of the block that is listed, "" for none.
    """

    def __init__(
        self,
        nodes: Mapping[str, NodeText],
        values: Mapping[str, Value],
        sites: Iterable[str],
        block: str,
    ) -> None:
        self._nodes = nodes
        self._values = values
        self._block = block
        self._returned = {arg[1:] for n in nodes.values() if n.op == "output" for arg in n.args}
        every = list(sites)
        inside = [site for site in every if block_of(site, (block,))]
        self._short = {**_shortest(every, ""), **_shortest(inside, block)}

    def site(self, path: str) -> str:
        """``q_proj``: the end of the path where that is one site of the listed block, or of all."""
        return self._short.get(path, within(path, self._block))

    def local(self, node: NodeText) -> str:
        """The node's name inside its site, "" for the module call at the site's own path."""
        site, name = node.tag.site, node.name
        if site is None:
            path = node.target if node.op in ("call_module", "get_attr") else name
            return operator_name(within(path, self._block))
        if node.op == "get_attr":
            return node.target.removeprefix(f"{site}.")
        if node.op == "call_module" and node.target == site:
            return ""
        return name.removeprefix(f"{site.replace('.', '_')}_")

    def reference(self, node: NodeText, reader: NodeText) -> str:
        """What ``reader`` calls ``node``: shorter where both belong to one site."""
        inlined = self.inline(node, reader)
        if inlined is not None:
            return inlined
        return self._qualified(node, reader)

    def inline(self, node: NodeText, reader: NodeText) -> str | None:
        """The text that stands for a node without a line of its own; None if it has one."""
        value = self._values.get(node.name, UNKNOWN)
        if value.scalar is not None:
            return value.scalar
        if node.op == "get_attr" and not is_codes(node):
            return self._qualified(node, reader)
        source = self._nodes.get(node.args[0][1:]) if node.args else None
        if source is None:
            return None
        if node.target == "flatten" and source.op == "get_attr":
            return self.reference(source, reader)
        if node.target == "getitem" and source.target in _PARTS:
            part = _PARTS[source.target][int(node.args[1])]
            return f"{self._qualified(source, reader)}.{part}"
        if node.target not in _INLINED or node.tag.is_output or node.name in self._returned:
            return None
        args = [self._words(text, reader) for text in node.args]
        return formula("getitem", args, ()) if len(args) == 2 else f"{node.target}({args[0]})"

    def operands(self, node: NodeText) -> str:
        """The node's operands in words."""
        args = [self._words(text, node) for text in node.args]
        kwargs = [(key, self._words(text, node)) for key, text in node.kwargs]
        if is_codes(node):
            return self._scales_of(node)
        if node.op == "call_module":
            return ", ".join(args)
        return formula(node.target, args, kwargs)

    def sources(self, node: NodeText) -> list[str]:
        """Names of the nodes with a line of their own that ``node`` reads, once each."""
        found: dict[str, None] = {}
        for text in (*node.args, *(text for _, text in node.kwargs)):
            for name in _REFERENCE.findall(text):
                source = self._nodes.get(name)
                if source is None or self._values.get(name, UNKNOWN).scalar is not None:
                    continue
                inlined = self.inline(source, node) is not None
                found.update(dict.fromkeys(self.sources(source) if inlined else [name]))
        return list(found)

    def outside(self, section: Section) -> list[str]:
        """Names of the nodes before the section that it reads."""
        own = {node.name for node in section.nodes}
        read = dict.fromkeys(name for node in section.nodes for name in self.sources(node))
        return [name for name in read if name not in own]

    def full(self, node: NodeText) -> str:
        """What a node of no site calls ``node``."""
        site = node.tag.site
        return ".".join(filter(None, (site and self.site(site), self.local(node))))

    def _words(self, operand: str, reader: NodeText) -> str:
        return _REFERENCE.sub(lambda m: self._named(m.group(1), reader), operand)

    def _named(self, name: str, reader: NodeText) -> str:
        node = self._nodes.get(name)
        return name if node is None else self.reference(node, reader)

    def _scales_of(self, codes: NodeText) -> str:
        scale = self._values.get(codes.name.removesuffix("weight") + "weight_scale", UNKNOWN)
        if scale.shape == "[]":
            return "weight, one scale"
        columns = scale.shape.rpartition(", ")[2].rstrip("]")
        return "weight, a scale each row" if columns == "1" else f"weight, {columns} scales a row"

    def _qualified(self, node: NodeText, reader: NodeText) -> str:
        local = self.local(node)
        return local if local and node.tag.site == reader.tag.site else self.full(node)


def _shortest(sites: Sequence[str], block: str) -> dict[str, str]:
    """The end of each path where no other ends so, else what follows the block."""
    last = [site.rpartition(".")[2] for site in sites]
    return {
        site: name if last.count(name) == 1 else within(site, block)
        for site, name in zip(sites, last, strict=True)
    }


def is_codes(node: NodeText) -> bool:
    """Whether the node reads a weight's integer codes."""
    return node.op == "get_attr" and node.target == f"{node.tag.site}.weight"


def rows(section: Section, names: Names, values: Mapping[str, Value]) -> list[Row]:
    """One row for each node that has a line of its own."""
    return [
        row(node, names, values.get(node.name, UNKNOWN))
        for node in section.nodes
        if names.inline(node, node) is None and node.op != "output"
    ]


def row(node: NodeText, names: Names, value: Value) -> Row:
    kinds = {"call_module": node.kind, "placeholder": "input", "get_attr": "buffer"}
    operator = "codes" if is_codes(node) else kinds.get(node.op, operator_name(node.target))
    return Row(
        site=names.site(node.tag.site) if node.tag.site else "",
        node=names.local(node),
        operator=operator,
        operands="" if operator in ("input", "buffer") else names.operands(node),
        dtype=value.dtype,
        shape=value.shape,
    )


@dataclass(frozen=True)
class Columns:
    """Widths that fit rows into a line; operands wrap, long names lean into the site's column."""

    site: int
    node: int
    operator: int
    operands: int
    dtype: int

    @classmethod
    def fitting(cls, found: Sequence[Row], width: int = WIDTH) -> Columns:
        every = [HEAD, *found]
        site = max(len(r.site) for r in every if r.node or len(r.site) <= _NODE)
        sited = max(len(r.node) for r in every if r.site or r is HEAD)
        loose = max(len(r.node) for r in every)
        alone = max(len(r.site or r.node) for r in every if not (r.site and r.node) or r is HEAD)
        node = max(sited, min(loose, _NODE), alone - site - len(_GAP))
        operator = max(len(r.operator) for r in every)
        dtype = max(len(r.dtype) for r in every)
        shape = max(len(r.shape) for r in every)
        left = width - site - node - operator - dtype - shape - 5 * len(_GAP)
        return cls(site, node, operator, max(left, 24), dtype)

    def lines(self, r: Row) -> list[str]:
        if r.site and not r.node:
            place = f"{r.site:<{self.site + len(_GAP) + self.node}}"
        elif r.site or len(r.node) <= self.node:
            place = f"{r.site:<{self.site}}{_GAP}{r.node:<{self.node}}"
        else:
            place = f"{r.node:>{self.site + len(_GAP) + self.node}}"
        first, *rest = textwrap.wrap(r.operands, self.operands, break_on_hyphens=False) or [""]
        start = f"{place}{_GAP}{r.operator:<{self.operator}}{_GAP}"
        line = f"{start}{first:<{self.operands}}{_GAP}{r.dtype:<{self.dtype}}{_GAP}{r.shape}"
        return [line.rstrip(), *(" " * len(start) + more for more in rest)]


def lay_out(found: Sequence[Row], columns: Columns | None = None) -> list[str]:
    """The rows as aligned lines, without the head."""
    columns = columns or Columns.fitting(found)
    return [line for r in found for line in columns.lines(r)]
