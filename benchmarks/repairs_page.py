"""docs/repairs_measured.md as text: prose whose figures are looked up in the data, then all rows.

The prose is benchmarks/repairs_page.template.md. In it ``{{smollm2 | w4+gptq | +.2f}}`` is the
loss difference of that row, ``{{smollm2 | w4+gptq | worst_kind_rescue | +.2f}}`` another field of
it, and ``{{cost | ours layer | wall | .0f}}`` seconds of benchmarks/gptq_cost.json; ``{{tables}}``
stands where the tables go.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.causes_found import causes_found
from benchmarks.repairs_tried import FAMILIES, spelled
from benchmarks.subjects import Subject
from benchmarks.weight_grids import weights_past
from fxquant.ir.calibration import version_words
from fxquant.ir.counted import counted

TEMPLATE = Path(__file__).with_suffix(".template.md")
NAMES = {"opt": "small OPT with planted outliers", "smollm2": "SmolLM2-135M"}
WIDTH = 110
_FIGURE = re.compile(r"\{\{([^{}]+)\}\}")


def page(subjects: Sequence[Subject], data: dict[str, Any], cost: dict[str, Any]) -> str:
    """The whole page, from what benchmarks.repairs_table and benchmarks.gptq_cost measured."""
    text = TEMPLATE.read_text(encoding="utf-8")
    sources = {short: data["rows"].get(name, {}) for short, name in NAMES.items()}
    sources |= {"cost": cost["seconds"], "ratio": cost["ratio"]}
    tables = "\n\n".join((*(table(subject, data) for subject in subjects), _setting(data)))

    def fill(found: re.Match[str]) -> str:
        return found[0] if found[1] == "tables" else figure(found[1], sources)

    blocks = _FIGURE.sub(fill, text).strip().split("\n\n")
    return "\n\n".join(map(wrapped, blocks)).replace("{{tables}}", tables) + "\n"


def figure(asked: str, sources: Mapping[str, Mapping[str, Any]]) -> str:
    """What stands for ``source | row | field | format``; without a field it is the loss difference.

    A row that was not measured says so. Raises KeyError for an unknown source or field.
    """
    source, row, *field, form = (part.strip() for part in asked.split("|"))
    known = sources[source].get(row)
    if known is None or "refused" in known:
        return "(not measured)"
    return format(known[field[0] if field else "delta_loss"], form).replace("-", "−")


def wrapped(block: str) -> str:
    """A paragraph, or the items of a list, in lines of one width whatever its figures are."""
    items = re.split(r"\n(?=- )", block)
    return "\n".join(
        textwrap.fill(
            " ".join(item.split()),
            WIDTH,
            subsequent_indent="  " if item.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for item in items
    )


def _setting(data: dict[str, Any]) -> str:
    made = version_words(data["versions"])
    return (
        f"fp32, seed {data['seed']}, text {data['text_hash']}, "
        f"{counted(data['threads'], 'thread')}; {made}. "
        "Causes (exact Shapley values) and the worst kind of site (Δloss recovered when it alone "
        "goes back to float) are of the first 256 tokens."
    )


def table(subject: Subject, data: dict[str, Any]) -> str:
    """The subject's rows, each beside the scheme that it repairs."""
    rows = data["rows"].get(subject.name, {})
    causes = causes_found(row.get("causes", {}) for row in rows.values())
    lines: list[tuple[str, ...]] = []
    missing: list[str] = []
    for family in FAMILIES:
        schemes = [spelled(family.base, repair) for repair in ("", *family.repairs)]
        without = rows.get(family.base, {}).get("delta_loss", float("nan"))
        lines += [_line(scheme, rows, without, causes) for scheme in schemes if scheme in rows]
        missing += [scheme for scheme in schemes if scheme not in rows]
    head = ("scheme", "Δloss ± s.e.", "of without", "bits", "convert s", *causes, "worst kind")
    setting = (
        f"**{subject.name}**: {subject.windows} windows of {subject.length} tokens of "
        f"{data['text']}, calibrated on {subject.calibration} others."
    )
    past = weights_past(subject.model)
    if past:
        setting += f" Its weights are {past} ([evaluation.md](evaluation.md))."
    if missing:
        setting += f" Not measured yet: {', '.join(f'`{scheme}`' for scheme in missing)}."
    body = tabulate(lines, head, tablefmt="github", disable_numparse=True)
    return "\n\n".join([f"{setting}\n\n{body}", *_refusals(rows)])


def _refusals(rows: dict[str, Any]) -> list[str]:
    """A line for each reason, with the schemes that were refused for it."""
    by_reason: dict[str, list[str]] = {}
    for scheme, row in rows.items():
        if "refused" in row:
            by_reason.setdefault(row["refused"], []).append(f"`{scheme}`")
    return [f"Refused: {', '.join(schemes)}: {why}." for why, schemes in by_reason.items()]


def _line(
    scheme: str, rows: dict[str, Any], without: float, listed: tuple[str, ...]
) -> tuple[str, ...]:
    row = rows[scheme]
    if "refused" in row:
        return (f"`{scheme}`", "refused", *[""] * (4 + len(listed)))
    causes = row.get("causes", {})
    kind = f"{row['worst_kind']} {row['worst_kind_rescue']:+.3f}" if causes else ""
    return (
        f"`{scheme}`",
        f"{row['delta_loss']:+.4f} ± {row['delta_error']:.4f}",
        f"{row['delta_loss'] / without:.2f}×",
        f"{row['bits_per_weight']:.2f}",
        f"{row['convert_seconds']:.0f}",
        *(f"{causes[cause]:+.3f}" if cause in causes else "" for cause in listed),
        kind,
    )
