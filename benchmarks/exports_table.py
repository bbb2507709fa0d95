"""docs/exports.md: what each format holds of each scheme, tried on tiny random models.

    python -m benchmarks.exports_table [TARGET ...]   try them, all of COLUMNS unless said
    python -m benchmarks.exports_table --render       the page from what was kept

Writes benchmarks/exports.json and, between its marks, the page. A cell is "exact", the rule of the
engine by which logits differ, the reason of a refusal, or why nothing was checked. A check
that fails is no refusal, and stops the run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

from tabulate import tabulate
from tqdm import tqdm
from transformers import PreTrainedModel

from fxquant.errors import ExportError
from fxquant.evaluation.models import versions
from fxquant.exports.check import Checked
from fxquant.exports.table import FORMATS
from fxquant.files.whole_file import write_text
from fxquant.schemes.scheme import Scheme
from tests.architectures import gpt2, token_ids
from tests.test_export_compressed import tiny_llama

HERE: Final = Path(__file__).parent
KEPT: Final = HERE / "exports.json"
PAGE: Final = HERE.parent / "docs" / "exports.md"
BEGIN, END = "<!-- exports -->", "<!-- /exports -->"
MODELS: Final[dict[str, Callable[[], PreTrainedModel]]] = {"Llama": tiny_llama, "GPT-2": gpt2}
# aoti compiles a library a cell, of the graph that pt2 writes down.
COLUMNS: Final = tuple(name for name in FORMATS if name != "aoti")
# Of the Llama, 64 and 96 columns, unless another model is named behind a comma.
SCHEMES: Final = (
    *("fp", "w8", "w4", "w3", "w8-tensor", "w8-asym", "w4-g32", "w4-g32-asym", "w4-g7"),
    *("w8a8-static", "w8a8-static-asym", "w8a8-dynamic", "w8a8-dynamic-token"),
    *("w8a8-dynamic-token-asym", "w8-asym/a8-dynamic-token", "w4a8-dynamic-token"),
    *("w4-g32/a8-dynamic-token", "w8a4-dynamic", "w8a8-dynamic-g16"),
    *("w8-g32-fp16", "w4-g32-fp16", "w4-g32-fp16-asym"),
    *("w4-g16-e4m3", "w4-g32-e8m0", "wnf4-g32", "wfp8", "fp8", "fp8-static"),
    *("w4-g32/afp8", "we4m3-tensor/ae4m3-static", "we4m3/ae5m2-dynamic-token", "we5m2"),
    *("mxfp8", "mxfp8-rceil", "wmxfp6", "mxfp6", "wmxfp4", "mxfp4", "mxfp4-even"),
    *("wnvfp4", "nvfp4", "wnvfp4+gptq", "we2m1-g64-e8m0"),
    '{"scheme": "fp8", "overrides": {"*.down_proj": "w8a8-dynamic-token"}}',
    *('{"scheme": "w8", "overrides": {"embeddings": "w8"}}',),
    *('{"scheme": "w8", "overrides": {"head": "w8"}}',),
    *(
        "w4+gptq",
        "w4-g32+awq",
        "w8a8-static+smooth",
        "w8a8-static+smooth(where=all)",
        "w8+equalize",
    ),
    *("w8+rotate(online=false)", "w8+rotate", "w8+correct_bias", "w8a8-static+split_outliers"),
    *("w8a8-dynamic+attn8", "w8+kv8", "w8, GPT-2", "w8a8-dynamic-token, GPT-2"),
)
EXACT, RULE, REFUSED, UNCHECKED = "exact", "by rule", "refused", "not checked"


@cache
def subject(name: str) -> PreTrainedModel:
    return MODELS[name]()


def tried(target: str, row: str) -> tuple[str, str]:
    """The kind of a cell, and its reason: a rule, a refusal, "" where it is exact."""
    scheme, name = row.split(", ") if row.endswith("GPT-2") else (row, "Llama")
    model = subject(name)
    calibration = [token_ids(2, 24, seed=4) % 90]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "export"
        try:
            found = FORMATS[target].export(model, place, scheme=scheme, calibration=calibration)
        except ExportError as error:
            if "nothing is written" in str(error):
                raise
            return REFUSED, _reason(str(error), scheme)
    return _kind(found.checked)


def _kind(found: Checked) -> tuple[str, str]:
    if found.skipped:
        return UNCHECKED, found.skipped
    near = found.difference <= found.allowed * found.largest
    # Codes at an edge, of which the check counts how many flip, are no other rule.
    flips = found.under_rules < found.difference and "of inputs differ" in found.cause
    return (EXACT, "") if near or flips else (RULE, found.cause)


def _reason(said: str, scheme: str) -> str:
    """Without the site and the scheme, which say nothing of the format, and without the hint."""
    text = said.partition("; nearest that it can")[0].partition(": ")
    reason = text[2] if "cannot hold" in text[0] else said
    return reason.replace(f"scheme {Scheme.parse(scheme)} ", "it ")


def measure(targets: list[str]) -> dict[str, Any]:
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {"targets": {}}
    for target in targets:
        bar = tqdm(SCHEMES, target, disable=None)
        kept["targets"][target] = {row: tried(target, row) for row in bar}
    rows = {name: kept["targets"][name] for name in FORMATS if name in kept["targets"]}
    return {"versions": versions(), "targets": rows}


def table() -> str:
    """What stands between the marks."""
    data = json.loads(KEPT.read_text())
    reasons: dict[str, int] = {}
    body = [
        [f"`{row}`", *(_cell(cells.get(row), reasons) for cells in data["targets"].values())]
        for row in SCHEMES
    ]
    text = tabulate(body, ("scheme", *data["targets"]), "github", disable_numparse=True)
    notes = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    made = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return f"{made}\n\n{text}\n\n{notes}"


def _cell(found: list[str] | None, reasons: dict[str, int]) -> str:
    if found is None:
        return ""
    kind, reason = found
    return f"{kind} ({reasons.setdefault(reason, len(reasons) + 1)})" if reason else kind


def rendered(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(COLUMNS))
    parser.add_argument("--render", action="store_true", help="the page alone")
    options = parser.parse_args()
    if not options.render:
        write_text(KEPT, json.dumps(measure(options.targets), indent=1) + "\n")
    write_text(PAGE, rendered(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
