"""Graphviz of one block: a box a line of the listing, an edge a value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fxquant.analysis.inspection.printer import Names, Row, Section, row
from fxquant.analysis.inspection.shapes import UNKNOWN, Value
from fxquant.errors import InspectionError
from fxquant.files.whole_file import write_bytes
from fxquant.ir.records import NodeText

_COLORS = {"int8": "#cfe2f3", "uint8": "#cfe2f3", "int32": "#d9ead3", "int64": "#eeeeee"}


def dot(section: Section, names: Names, values: Mapping[str, Value]) -> str:
    """DOT text: nodes grouped by site, colored by dtype, edges from operands to results."""
    shown = {n.name: n for n in section.nodes if names.inline(n, n) is None and n.op != "output"}
    lines = [f"digraph {_quoted(section.title)} {{", '  node [shape=box, fontname="monospace"];']
    sites = dict.fromkeys(node.tag.site for node in shown.values())
    for number, site in enumerate(sites):
        own = [node for node in shown.values() if node.tag.site == site]
        boxes = [_box(node, row(node, names, values.get(node.name, UNKNOWN))) for node in own]
        if site is None:
            lines += boxes
        else:
            label = f"    label={_quoted(names.site(site))};"
            lines += [f"  subgraph cluster_{number} {{", label, *(f"  {b}" for b in boxes), "  }"]
    lines += [f"  {_quoted(name)} [style=dashed];" for name in names.outside(section)]
    for node in shown.values():
        edges = names.sources(node)
        lines += [f"  {_quoted(source)} -> {_quoted(node.name)};" for source in edges]
    return "\n".join([*lines, "}"]) + "\n"


def _box(node: NodeText, found: Row) -> str:
    title = f"{found.node or found.site} = {found.operator}"
    label = _quoted(f"{title}\n{found.dtype} {found.shape}".strip())
    color = _COLORS.get(found.dtype, "#ffffff")
    return f'  {_quoted(node.name)} [label={label}, style=filled, fillcolor="{color}"];'


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def write_dot(text: str, path: Path) -> None:
    """Write DOT text, or an SVG of it where the file is called ``.svg``.

    Raises InspectionError where the SVG needs what is not installed, or the file cannot be written.
    """
    data = _svg(text) if path.suffix == ".svg" else text.encode()
    write_bytes(path, data, error=InspectionError)


def _svg(text: str) -> bytes:
    try:
        import graphviz
    except ImportError as error:
        raise InspectionError(
            "an SVG needs the extra: pip install 'fxquant[graph]'; a .dot file needs nothing"
        ) from error
    try:
        svg: bytes = graphviz.Source(text).pipe(format="svg")
    except graphviz.ExecutableNotFound as error:
        raise InspectionError(
            "an SVG needs Graphviz's program dot on the PATH (the package called graphviz of the "
            "operating system); a .dot file needs nothing"
        ) from error
    return svg
