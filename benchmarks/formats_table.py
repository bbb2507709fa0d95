"""docs/formats_measured.md: every format measured, then written from what the run leaves.

    python -m benchmarks.formats_table                measure what is missing, then write the page
    python -m benchmarks.formats_table --render       write the page from the data that is there
    python -m benchmarks.formats_table --minutes 9    begin no row after so long
    python -m benchmarks.formats_table --only four    a part: eight, four, both, repaired

The data are benchmarks/formats_table.json; a run that is interrupted goes on from it. Times are of
benchmarks/convert_cost.json, which benchmarks.convert_cost writes. The prose of the page is
benchmarks/formats_page.template.md, the rows are benchmarks/formats_tried.py.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import torch

from benchmarks.formats_page import page
from benchmarks.formats_tried import GROUPS, SUBJECT
from benchmarks.subjects import ROOT
from fxquant.errors import FxquantError
from fxquant.evaluation.converter import Converter, measure
from fxquant.evaluation.data import Source, load_text
from fxquant.evaluation.models import versions
from fxquant.evaluation.statistics import WindowSums
from fxquant.evaluation.token_windows import Windows
from fxquant.files.whole_file import write_text
from fxquant.schemes.scheme import Scheme

DATA = ROOT / "benchmarks" / "formats_table.json"
COST = ROOT / "benchmarks" / "convert_cost.json"
PAGE = ROOT / "docs" / "formats_measured.md"
TOGETHER = 4  # windows a call where only weights are codes: a call decodes them once


def read_data() -> dict[str, Any]:
    """What was measured so far."""
    data: dict[str, Any] = json.loads(DATA.read_text()) if DATA.exists() else {"rows": {}}
    return data


def keep(text: Source, scheme: str, row: dict[str, Any]) -> None:
    """Add a row to DATA as it is now."""
    data = read_data()
    data.update(
        text=text.name, text_hash=text.digest, versions=versions(), threads=torch.get_num_threads()
    )
    data["rows"][scheme] = row
    write_text(DATA, json.dumps(data, indent=1) + "\n")


def measure_all(only: str | None, minutes: float) -> None:
    """Measure every row that DATA does not have; it is written after each."""
    end = time.monotonic() + 60 * minutes
    text = load_text("builtin")
    prepared = SUBJECT.prepare(text)
    windows = prepared.windows
    converter = Converter(prepared.graph, windows.batches)
    if "fp" not in read_data()["rows"]:
        keep(text, "fp", _row(converter, "fp", windows, None))
    kept = read_data()["rows"]["fp"]
    reference = WindowSums(tuple(kept["window_nll"]), tuple(kept["window_tokens"]))
    for name, schemes in GROUPS.items():
        for scheme in schemes if only in (None, name) else ():
            if scheme not in read_data()["rows"] and time.monotonic() < end:
                row = _row(converter, scheme, windows, reference)
                keep(text, scheme, row)
                said = row.get("refused", f"{row.get('delta_loss', math.nan):+.4f}")
                print(f"{scheme}: {said}", flush=True)


def _row(
    converter: Converter, scheme: str, windows: Windows, reference: WindowSums | None
) -> dict[str, Any]:
    parsed = Scheme.parse(scheme)
    inputs = any(spec.activation is not None for spec in parsed.specs)
    try:
        row = measure(converter, parsed, windows, 1 if inputs else TOGETHER, reference)
    except FxquantError as error:
        return {"refused": str(error)}
    return {
        "scheme": row.scheme,
        "delta_loss": row.delta_loss,
        "delta_error": row.delta_error,
        "bits_per_weight": None if math.isnan(row.bits_per_weight) else row.bits_per_weight,
        "window_nll": row.window_nll,
        "window_tokens": row.window_tokens,
    }


def render() -> None:
    """Write the page from what was measured."""
    write_text(PAGE, page(read_data(), json.loads(COST.read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="write the page, measure nothing")
    parser.add_argument("--only", choices=tuple(GROUPS), help="measure a part, write no page")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after it")
    options = parser.parse_args()
    if not options.render:
        measure_all(options.only, options.minutes)
    if options.only is None:
        render()


if __name__ == "__main__":
    main()
