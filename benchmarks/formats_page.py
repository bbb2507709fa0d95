"""docs/formats_measured.md as text: prose whose figures are looked up in the data, and tables.

The prose is benchmarks/formats_page.template.md. In it ``{{row | wnvfp4 | +.2f}}`` is a loss
difference, ``{{part | wnvfp4 | scale | +.3f}}`` what one part of a format takes, ``{{ratio |
wnvfp4+gptq | .2f}}`` a repaired loss over that of rounding to nearest, ``{{cost | fp8 | ratio |
.2f}}`` is of benchmarks/convert_cost.json, and ``{{table parts}}`` stands where a table goes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.formats_tried import BOTH, EIGHT, GROUPS, SUBJECT
from benchmarks.repairs_page import figure, wrapped
from benchmarks.study_trust import table_of
from benchmarks.weight_grids import weights_past
from fxquant.evaluation.statistics import Difference, WindowSums, paired_difference
from fxquant.ir.calibration import version_words
from fxquant.ir.counted import counted

TEMPLATE = Path(__file__).with_suffix(".template.md")
# Of each format: the same elements and blocks with exact scales, and those in blocks of 16.
PARTS_OF = {
    "wmxfp4": ("MXFP4, rule floor", "we2m1-g32", "we2m1-g16"),
    "wmxfp4-even": ("MXFP4, rule even", "we2m1-g32", "we2m1-g16"),
    "wmxfp4-rceil": ("MXFP4, rule rceil", "we2m1-g32", "we2m1-g16"),
    "wmxfp4-ceil": ("MXFP4, rule ceil", "we2m1-g32", "we2m1-g16"),
    "wnvfp4": ("NVFP4", "we2m1-g16", "we2m1-g16"),
    "w4-g32-e8m0-rceil": ("int4 in MXFP4's place", "w4-g32", "w4-g16"),
    "w4-g16-e4m3": ("int4 in NVFP4's place", "w4-g16", "w4-g16"),
    "we2m1": ("E2M1, one scale a row", "we2m1", "we2m1-g16"),
    "w4": ("int4, one scale a row", "w4", "w4-g16"),
}
Rows = Mapping[str, dict[str, Any]]
_FIELD = re.compile(r"\{\{([^{}]+)\}\}")


def page(data: dict[str, Any], cost: dict[str, Any]) -> str:
    """The whole page, from what benchmarks.formats_table and benchmarks.convert_cost measured."""
    rows = {name: row for name, row in data["rows"].items() if "refused" not in row}
    parts = {name: found for name in PARTS_OF if (found := _parts(rows, name)) is not None}
    ratios = {
        name: {"delta_loss": row["delta_loss"] / rows[base]["delta_loss"]}
        for name, row in rows.items()
        if "+" in name and (base := name.partition("+")[0]) in rows
    }
    values = {
        name: {part: change.delta for part, change in found.items()}
        for name, found in parts.items()
    }
    sources: dict[str, Mapping[str, Any]] = {
        "row": rows,
        "part": values,
        "ratio": ratios,
        "best": _best(rows),
        "cost": cost["schemes"],
    }
    tables = {
        "table parts": _parts_table(rows, parts),
        "table equal": _equal_table(rows),
        "table both": _plain_table(rows, ("wmxfp4", "wmxfp4-rceil", "wnvfp4", *BOTH)),
        "table repaired": _repaired_table(rows, ratios),
        "table eight": _plain_table(rows, EIGHT),
        "setting": _setting(data),
        "cost setting": _cost_setting(cost),
    }

    def fill(found: re.Match[str]) -> str:
        return found[0] if found[1] in tables else _figure(found[1], sources)

    blocks = _FIELD.sub(fill, TEMPLATE.read_text(encoding="utf-8")).strip().split("\n\n")
    text = "\n\n".join(map(wrapped, blocks))
    for name, table in tables.items():
        text = text.replace("{{" + name + "}}", table)
    return text + "\n"


def _figure(asked: str, sources: Mapping[str, Mapping[str, Any]]) -> str:
    """As ``figure``; ``best | 4.5`` is the name of a scheme."""
    source, row, *rest = (part.strip() for part in asked.split("|"))
    if source == "best" and not rest:
        return f"`{sources[source][row]['name']}`"
    return figure(asked, sources)


def _sums(row: dict[str, Any]) -> WindowSums:
    return WindowSums(tuple(row["window_nll"]), tuple(row["window_tokens"]))


def _change(rows: Rows, ours: str, reference: str) -> Difference:
    return paired_difference(_sums(rows[ours]), _sums(rows[reference]))


def _parts(rows: Rows, scheme: str) -> dict[str, Difference] | None:
    """What elements, blocks and scales take, one after the other; None where a row is missing."""
    _, exact, fine = PARTS_OF[scheme]
    if not {scheme, exact, fine} <= rows.keys():
        return None
    return {
        "grid": _change(rows, fine, "fp"),
        "block": _change(rows, exact, fine),
        "scale": _change(rows, scheme, exact),
    }


def _best(rows: Rows) -> dict[str, Any]:
    """The scheme of 4 bits, weights alone, that loses least up to so many bits, by these; and
    among those that no repair changed (``plain``)."""
    found = {}
    for most in (4.25, 4.5):
        for label, repaired in ((f"{most:g}", True), (f"plain {most:g}", False)):
            within = [
                (row["delta_loss"], name)
                for name, row in rows.items()
                if name in (*GROUPS["four"], *GROUPS["repaired"])
                and row["bits_per_weight"] <= most + 0.005
                and (repaired or "+" not in name)
            ]
            if within:
                name = min(within)[1]
                found[label] = {**rows[name], "name": name}
    return found


def _parts_table(rows: Rows, parts: Mapping[str, Mapping[str, Difference]]) -> str:
    body = [
        [
            PARTS_OF[name][0],
            f"`{name}`",
            _bits(rows[name]),
            str(_change(rows, name, "fp")),
            str(found["grid"]),
            "" if PARTS_OF[name][1] == PARTS_OF[name][2] else str(found["block"]),
            "" if PARTS_OF[name][1] == name else str(found["scale"]),
        ]
        for name, found in parts.items()
    ]
    head = ["format", "scheme", "bits", "Δloss ± s.e.", "elements", "block size", "scale rounding"]
    return table_of(body, head)


def _equal_table(rows: Rows) -> str:
    """Weights alone by bits, then by loss."""
    known = [name for name in GROUPS["four"] if name in rows]
    known.sort(key=lambda name: (round(rows[name]["bits_per_weight"], 2), rows[name]["delta_loss"]))
    body = [[_bits(rows[n]), f"`{n}`", _stands_for(n, rows), _delta(rows[n])] for n in known]
    return table_of(body, ["bits", "scheme", "stands for", "Δloss ± s.e."])


def _plain_table(rows: Rows, schemes: Iterable[str]) -> str:
    body = [
        [f"`{n}`", _stands_for(n, rows), _bits(rows[n]), _delta(rows[n])]
        for n in schemes
        if n in rows
    ]
    return table_of(body, ["scheme", "stands for", "bits/weight", "Δloss ± s.e."])


def _stands_for(name: str, rows: Rows) -> str:
    spelled = rows[name]["scheme"]
    return "" if spelled == name else f"`{spelled}`"


def _repaired_table(rows: Rows, ratios: Mapping[str, Mapping[str, float]]) -> str:
    known = sorted(ratios, key=lambda name: rows[name]["delta_loss"])
    body = [
        [
            f"`{name}`",
            _bits(rows[name]),
            _delta(rows[name]),
            _delta(rows[name.partition("+")[0]]),
            f"{ratios[name]['delta_loss']:.2f}",
        ]
        for name in known
    ]
    return table_of(body, ["scheme", "bits", "Δloss ± s.e.", "rounded to nearest", "ratio"])


def _setting(data: dict[str, Any]) -> str:
    past = weights_past(SUBJECT.model)
    missing = [n for group in GROUPS.values() for n in group if n not in data["rows"]]
    text = (
        f"{SUBJECT.name} (`{SUBJECT.model}`; weights {past}), {SUBJECT.windows} windows of "
        f"{SUBJECT.length} tokens of {data['text']} ({data['text_hash'][:23]}), calibrated on "
        f"{SUBJECT.calibration} others; float32 on CPU, {counted(data['threads'], 'thread')}; "
        f"{version_words(data['versions'])}."
    )
    return text + (f" Not measured yet: {', '.join(f'`{n}`' for n in missing)}." if missing else "")


def _cost_setting(cost: dict[str, Any]) -> str:
    windows, length = cost["calibration"]
    return (
        f"{counted(cost['blocks'], 'block')} of {SUBJECT.name}'s shapes with random weights, "
        f"static ranges of {counted(windows, 'window')} of {length} tokens; medians of "
        f"{counted(cost['rounds'], 'round')}, {cost['clock']} seconds, "
        f"{counted(cost['threads'], 'thread')} of {cost['processor']}; "
        f"{version_words(cost['versions'])}"
    )


def _bits(row: dict[str, Any]) -> str:
    return f"{row['bits_per_weight']:.2f}"


def _delta(row: dict[str, Any]) -> str:
    return str(Difference(row["delta_loss"], row["delta_error"]))
