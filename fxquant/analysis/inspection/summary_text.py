"""A Summary as text or Markdown."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile

from tabulate import tabulate

from fxquant.analysis.inspection.folding import fold
from fxquant.analysis.inspection.summary import SiteRow, Summary, span
from fxquant.ir.blocks import within
from fxquant.ir.calibration import calibration_words
from fxquant.ir.coverage import share_words
from fxquant.ir.records import PassRecord, SiteRecord
from fxquant.ir.size import Bytes
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.spelling import spell_activation, spell_weight

WIDTH = 100
BLOCK_ROLES = ("linear", "matmul")
_BITS = "stored in the blocks' linears: codes, scales and zero points, no biases; float ones too"


def render(summary: Summary, *, markdown: bool = False, folded: bool = True) -> str:
    """Header, history, sites, what was left in float, notes.

    ``folded``: one line for what is said of many sites alike.
    """
    style = "github" if markdown else "simple"
    title = "## {}" if markdown else "{}"
    parts = [_header(summary)]
    if summary.history:
        table = tabulate(
            [_history_row(record) for record in summary.history],
            headers=["pass", "nodes +", "-", "replaced", "sites", "ms", "difference"],
            tablefmt=style,
            colalign=("left", *["right"] * 6),
            disable_numparse=True,
        )
        parts += [title.format("History"), table]
    if summary.sites:
        prefix = _common(row.path for row in summary.sites if row.site.role in BLOCK_ROLES)
        cells = [_cells(row, prefix) for row in summary.sites]
        table = _sites_table(cells if markdown else _fitted(cells), style)
        below = f" (below {prefix})" if prefix else ""
        parts += [title.format(f"Sites{below}"), table, _LEGEND]
    if summary.left_in_float:
        lines = _remarks(((e.path, e.reason) for e in summary.left_in_float), folded)
        parts += [title.format("Left in float"), _wrapped(lines)]
    if summary.notes:
        origins = dict.fromkeys(note.origin for note in summary.notes)
        lines = [
            f"{origin}: {line}"
            for origin in origins
            for line in _remarks(
                ((n.site, n.text) for n in summary.notes if n.origin == origin), folded
            )
        ]
        parts += [title.format("Notes"), _wrapped(lines)]
    return "\n\n".join(parts) if markdown else _spaced(parts)


_HEADERS = ("site", "shape", "weight", "input", "scale", "range", "outside", "SQNR")
# Where a cell may go on in a new line, in the order in which columns give way: never in a number.
_BREAKS = (("range", " "), ("input", "-"), ("weight", "-"), ("site", ". "), ("site", "._ "))


def _sites_table(cells: Sequence[Sequence[str]], style: str) -> str:
    return tabulate(cells, headers=_HEADERS, tablefmt=style, disable_numparse=True)


def _fitted(cells: Sequence[Sequence[str]]) -> list[list[str]]:
    """The rows with line breaks in names and between words, until the table is at most WIDTH wide
    or nothing is left to break."""
    rows = [list(row) for row in cells]
    for header, breaks in _BREAKS:
        column = _HEADERS.index(header)
        widths = [  # tabulate leaves two columns more than a header has
            max(len(name) + 2, *(len(line) for row in rows for line in row[index].split("\n")))
            for index, name in enumerate(_HEADERS)
        ]
        excess = sum(widths) + 2 * (len(widths) - 1) - WIDTH
        if excess > 0:
            for row, cell in zip(rows, cells, strict=True):
                row[column] = _broken(cell[column], widths[column] - excess, breaks)
    return rows


def _broken(text: str, room: int, breaks: str) -> str:
    """``text`` in lines of at most ``room`` where that can be, cut behind the ``breaks``."""
    lines = [""]
    for piece in re.findall(rf"[^{breaks}]*[{breaks}]|[^{breaks}]+", text):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > room:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.strip() for line in lines)


def _remarks(entries: Iterable[tuple[str, str]], folded: bool) -> list[str]:
    return (
        [str(r) for r in fold(entries)] if folded else [f"{site}: {text}" for site, text in entries]
    )


_LEGEND = (
    "scale: of the input where its range is static, in float units a code. range: of the\n"
    "calibrated input, with its estimator. outside: share of the calibration's elements outside\n"
    "it. SQNR: of the weight's codes, in dB. a–b: smallest and largest of the blocks."
)


def _spaced(parts: Sequence[str]) -> str:
    """Titles directly above their tables, an empty line before each title."""
    titles = ("History", "Sites", "Left in float", "Notes")
    text = parts[0]
    for part in parts[1:]:
        text += ("\n\n" if part.startswith(titles) and "\n" not in part else "\n") + part
    return text


def _wrapped(lines: Sequence[str]) -> str:
    return "\n".join(textwrap.fill(f"- {line}", WIDTH, subsequent_indent="  ") for line in lines)


def _header(summary: Summary) -> str:
    before, after = (sum(n for _, n in b) for b in (summary.bytes_before, summary.bytes_after))
    saved = f" ({after / before:.1%} of before)" if before else ""
    bits = summary.bits_per_weight
    rows = [
        ("model", summary.model),
        ("scheme", summary.scheme),
        ("level", summary.level),
        ("calibrated on", calibration_words(summary.calibration)),
        ("parameters", f"{summary.parameters:,}"),
        ("bytes before", _bytes(summary.bytes_before)),
        ("bytes after", f"{_bytes(summary.bytes_after)}{saved}"),
        (
            "bits/weight",
            "-" if bits != bits else f"{bits:.2f} {_BITS}",
        ),
    ]
    if summary.float_share > 0:
        rows.append(("left in float", f"{share_words(summary.float_share)}, which bits count too"))
    if "(" in summary.frontend:  # another front end gave up
        rows.insert(1, ("traced by", summary.frontend))
    if summary.weights:
        rows.insert(1, ("weights", summary.weights))
    return "\n".join(
        textwrap.fill(f"{name:<17}{value}", WIDTH, subsequent_indent=" " * 17)
        for name, value in rows
    )


def _bytes(found: Bytes) -> str:
    each = " + ".join(f"{name} {count:,}" for name, count in found)
    return f"{sum(count for _, count in found):,} = {each}" if len(found) > 1 else each


def _history_row(record: PassRecord) -> list[str]:
    difference = "lossy" if record.difference is None else f"{record.difference:.1e}"
    if record.difference == 0:
        difference = "0"
    counts = (record.added, record.removed, record.replaced, record.sites)
    spelling = record.spelling or record.name
    return [spelling, *map(str, counts), f"{record.milliseconds:.1f}", difference]


def _common(paths: Iterable[str]) -> str:
    """What all dotted paths have in common in front of their last name, "" for nothing."""
    parts = [path.split(".")[:-1] for path in paths]
    alike = takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return ".".join(names[0] for names in alike)


def _cells(row: SiteRow, prefix: str) -> list[str]:
    weight, activation = _specs(row)
    records = row.records
    clipped = span(record.clipped for record in records)
    return [
        _place(row, prefix),
        "-" if row.site.role == "matmul" else "×".join(map(str, row.site.shape)),
        weight,
        activation,
        _between(span(record.scale for record in records), ".2g"),
        _range(records),
        _between(clipped, ".2%"),
        _between(span(record.weight_sqnr for record in records), ".1f"),
    ]


def _place(row: SiteRow, prefix: str) -> str:
    inside = row.site.role in BLOCK_ROLES
    path = within(row.path, prefix) if inside else row.path.rpartition(".")[2]
    return path + (f" ({row.count})" if row.count > 1 else "")


def _specs(row: SiteRow) -> tuple[str, str]:
    if row.site.role == "matmul":
        return "-", "float" if row.spec == "fp" else row.spec.partition(":")[0]
    site = Scheme.parse(row.spec).spec
    if site.weight is None:
        return "float", "float"
    activation = "float" if site.activation is None else spell_activation(site.activation)
    return spell_weight(site.weight), activation.partition(":")[0]


def _range(records: Sequence[SiteRecord]) -> str:
    low = span(record.low for record in records)
    high = span(record.high for record in records)
    if low is None or high is None:
        return "each batch" if records and _has_codes(records[0]) else "-"
    estimator = Counter(record.estimator for record in records).most_common(1)[0][0]
    symmetric = all(-(r.low or 0) == r.high for r in records)
    ends = f"±{_between(high, '.2g')}" if symmetric else f"{low[0]:.2g}..{high[1]:.2g}"
    return f"{ends} {estimator}"


def _has_codes(record: SiteRecord) -> bool:
    """Whether an input of the site becomes codes; a product's operand always does."""
    return bool(record.operand) or Scheme.parse(record.spec).spec.activation is not None


def _between(ends: tuple[float, float] | None, form: str) -> str:
    if ends is None:
        return "-"
    low, high = (format(end, form) for end in ends)
    return low if low == high else f"{low}–{high}"
