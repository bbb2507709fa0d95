"""The page: a results folder rendered into one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxquant.errors import DataError
from fxquant.evaluation.report.explanation import Explanation, read_explanation
from fxquant.evaluation.report.folder import Folder, Source, read_folder
from fxquant.evaluation.report.inspection import Inspection, read_inspection
from fxquant.evaluation.report.ladder import Ladder, Rung, ladders
from fxquant.evaluation.report.missing import Missing, missing_parts
from fxquant.evaluation.report.summary import Fact, summary
from fxquant.evaluation.report.tables import text_of
from fxquant.evaluation.tables import LEGEND
from fxquant.files.doors import Location, as_path
from fxquant.files.whole_file import write_text
from fxquant.ir.counted import counted

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE = Path(__file__).parent / "page"
FONTS = {
    "inter_latin": "inter-latin-wght-normal.woff2",
    "inter_greek": "inter-greek-wght-normal.woff2",
    "mono": "ibm-plex-mono-latin-400-normal.woff2",
}
LIBRARIES = (("d3-7.9.2.min.js", "d3.LICENSE"), ("plot-0.6.17.umd.min.js", "plot.LICENSE"))
SCRIPTS = (
    "core.js",
    "theme.js",
    "tabs.js",
    "tables.js",
    "ladder.js",
    "causes.js",
    "heatmap.js",
    "histogram.js",
)


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    title: str
    subtitle: str
    facts: tuple[Fact, ...]
    ladders: tuple[Ladder, ...]
    explanations: tuple[Explanation, ...]
    inspections: tuple[Inspection, ...]
    sources: tuple[Source, ...]
    missing: tuple[Missing, ...]


def write_report(results: Location, output: Location) -> Report:
    """Write the report of folder ``results`` to ``output``, in one step.

    Raises DataError where a part of the folder is damaged, where it holds none, where jinja2 is
    not installed, or where ``output`` cannot be written.
    """
    target = as_path(output, "output")
    report = read_report(results)
    text = render(report)
    write_text(target, text, what="the report to ")
    return report


def read_report(results: Location) -> Report:
    """Read every part of folder ``results``; DataError as in write_report."""
    results = as_path(results, "results")
    folder: Folder = read_folder(results)
    try:
        found = tuple(ladders(folder))
    except DataError as error:  # results that do not go together
        raise DataError(f"{results}: {error}") from error
    explanations = tuple(map(read_explanation, folder.explanations))
    inspections = tuple(map(read_inspection, folder.inspections))
    return Report(
        title=_title(found, explanations, inspections) or results.resolve().name,
        subtitle=_subtitle(found),
        facts=tuple(summary(found, explanations, inspections)),
        ladders=found,
        explanations=explanations,
        inspections=inspections,
        sources=folder.sources,
        missing=tuple(missing_parts(found, explanations, inspections, results)),
    )


def _title(
    found: tuple[Ladder, ...],
    explanations: tuple[Explanation, ...],
    inspections: tuple[Inspection, ...],
) -> str:
    """The models, each once; else the first thing that has a name."""
    models = [value for ladder in found for key, value in ladder.provenance if key == "model"]
    named = [e.title for e in explanations] + [i.title for i in inspections]
    return ", ".join(dict.fromkeys(models)) or next(iter(named), "")


def _subtitle(found: tuple[Ladder, ...]) -> str:
    """What the first ladder was measured on."""
    facts = dict(found[0].provenance) if found else {}
    words = [facts.get("dataset"), facts.get("protocol")]
    if "windows" in facts and "length" in facts:
        windows = counted(int(facts["windows"]), "window")
        words.append(f"{windows} of {counted(int(facts['length']), 'token')}")
    if "dtype" in facts and "device" in facts:
        words.append(f"{facts['dtype']} on {facts['device']}")
    return ", ".join(word for word in words if word)


def render(report: Report) -> str:
    """The HTML text. What came from files is escaped; styles, scripts and fonts stand inside."""
    vendor = PAGE / "vendor"
    fonts = {
        name: base64.b64encode((vendor / file).read_bytes()).decode()
        for name, file in FONTS.items()
    }
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            report=report,
            style=(PAGE / "style.css").read_text(encoding="utf-8"),
            fonts=fonts,
            ladder_legend=LEGEND,
            libraries=[_library(vendor, file, licence) for file, licence in LIBRARIES],
            scripts=[(PAGE / "scripts" / name).read_text(encoding="utf-8") for name in SCRIPTS],
            version=version("fxquant"),
            data=embeddable(chart_data(report)),
        )
    )


def _library(vendor: Path, file: str, licence: str) -> str:
    """A library behind its licence, which has to go wherever the library goes."""
    terms = (vendor / licence).read_text(encoding="utf-8").strip()
    return f"/*!\n{terms}\n*/\n{(vendor / file).read_text(encoding='utf-8')}"


def chart_data(report: Report) -> dict[str, Any]:
    """What the charts draw, as plain data."""
    return {
        "ladders": [[_rung(rung) for rung in ladder.rungs] for ladder in report.ladders],
        "explanations": [
            {
                "delta_loss": explanation.delta_loss,
                "causes": explanation.causes,
                "figures": [asdict(figure) for figure in explanation.figures],
                "cells": [asdict(cell) for cell in explanation.cells],
                "recovery": explanation.recovery,
            }
            for explanation in report.explanations
        ],
        "inspections": [
            [asdict(histogram) for histogram in inspection.histograms]
            for inspection in report.inspections
        ],
    }


def embeddable(value: Any) -> str:
    """JSON that can stand in a script element: no ``<``, no NaN (null instead)."""
    text = json.dumps(_finite(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rung(rung: Rung) -> dict[str, Any]:
    return {
        "scheme": rung.scheme,
        "error": rung.error,
        "delta": rung.delta_loss,
        "se": rung.standard_error,
        "seeds": [row.delta_loss for row in rung.rows if math.isfinite(row.delta_loss)],
    }


def _environment() -> Environment:
    try:
        import jinja2
    except ImportError as error:
        raise DataError("the report needs jinja2: pip install 'fxquant[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["as"] = text_of
    return environment
