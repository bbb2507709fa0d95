"""docs/repairs_measured.md: every repair measured, then written from what the run leaves.

    python -m benchmarks.repairs_table              measure what is missing, then write the page
    python -m benchmarks.repairs_table --render     write the page from the data that is there
    python -m benchmarks.repairs_table --base w4    measure only what repairs w4

The data are benchmarks/repairs_table.json; a run that is interrupted goes on from it. The prose of
the page is benchmarks/repairs_page.template.md, the rows are benchmarks/repairs_tried.py.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch.fx import GraphModule

from benchmarks.repairs_page import page
from benchmarks.repairs_tried import FAMILIES, SUBJECTS, spelled
from benchmarks.subjects import ROOT, Subject
from fxquant.analysis.explanation import explain
from fxquant.errors import FxquantError
from fxquant.evaluation.converter import Converter, measure
from fxquant.evaluation.data import Source, load_text
from fxquant.evaluation.models import versions
from fxquant.evaluation.statistics import WindowSums
from fxquant.evaluation.token_windows import Windows
from fxquant.files.whole_file import write_text
from fxquant.schemes.scheme import Scheme

DATA = ROOT / "benchmarks" / "repairs_table.json"
COST = ROOT / "benchmarks" / "gptq_cost.json"
PAGE = ROOT / "docs" / "repairs_measured.md"


def read_data() -> dict[str, Any]:
    """What was measured so far."""
    data: dict[str, Any] = json.loads(DATA.read_text()) if DATA.exists() else {"rows": {}}
    return data


def keep(subject: Subject, text: Source, scheme: str, row: dict[str, Any]) -> None:
    """Add a row to DATA as it is now."""
    data = read_data()
    data.update(
        text=text.name,
        text_hash=text.digest,
        versions=versions(),
        threads=torch.get_num_threads(),
        seed=0,
    )
    data["rows"].setdefault(subject.name, {})[scheme] = row
    write_text(DATA, json.dumps(data, indent=1) + "\n")
    print(subject.name, scheme, row, flush=True)


def measure_all(base: str | None) -> None:
    """Measure every row that DATA does not have; it is written after each."""
    text = load_text("builtin")
    for subject in SUBJECTS:
        prepared = subject.prepare(text)
        windows = prepared.windows
        converter = Converter(prepared.graph, windows.batches)
        reference = measure(converter, Scheme(), windows, 1, None).sums
        for family in FAMILIES:
            for repair in ("", *family.repairs) if base in (None, family.base) else ():
                scheme = spelled(family.base, repair)
                known = read_data()["rows"].get(subject.name, {}).get(scheme)
                row = known or _row(converter, scheme, windows, reference)
                if repair in family.explained and "causes" not in row and "refused" not in row:
                    row = {**row, **_taken_apart(converter.graph, scheme, windows)}
                if row != known:
                    keep(subject, text, scheme, row)


def _row(
    converter: Converter, scheme: str, windows: Windows, reference: WindowSums
) -> dict[str, Any]:
    try:
        row = measure(converter, Scheme.parse(scheme), windows, 1, reference)
    except FxquantError as error:
        return {"refused": str(error)}
    return {
        "delta_loss": row.delta_loss,
        "delta_error": row.delta_error,
        "bits_per_weight": row.bits_per_weight,
        "convert_seconds": row.convert_seconds,
    }


def _taken_apart(graph: GraphModule, scheme: str, windows: Windows) -> dict[str, Any]:
    """Causes of the loss difference on the first window of 256 tokens, and the worst kind."""
    explanation = explain(
        graph,
        scheme,
        calibration=windows.calibration.split(1),
        data=windows.evaluation[:1, :256],
        methods=("causes", "rescue:kinds"),
        worst=0,
    )
    kinds = {kind.name: kind.measured["rescue:kinds"] for kind in explanation.kinds}
    worst = max(kinds, key=lambda name: kinds[name])
    return {
        "causes": dict(explanation.causes or {}),
        "worst_kind": worst,
        "worst_kind_rescue": kinds[worst],
    }


def render() -> None:
    """Write the page from what was measured."""
    write_text(PAGE, page(SUBJECTS, read_data(), json.loads(COST.read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="write the page, measure nothing")
    parser.add_argument("--base", help="measure only the repairs of this scheme, write no page")
    options = parser.parse_args()
    if not options.render:
        measure_all(options.base)
    if options.base is None:
        render()


if __name__ == "__main__":
    main()
