"""docs/architectures.md: what works on each architecture, tried on tiny random models.

    python -m benchmarks.architectures_table            try them under the transformers at hand
    python -m benchmarks.architectures_table --render   the page from what was kept

Writes benchmarks/architectures-4.json or -5.json, by transformers' major version, and the page from
both. A cell that is no "yes" is the reason that the error gives.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch
import transformers
from tabulate import tabulate
from torch.fx import GraphModule
from tqdm import tqdm
from transformers import PreTrainedModel

import fxquant
from fxquant.errors import ExportError, FxquantError
from fxquant.evaluation.models import versions
from fxquant.files.whole_file import write_text
from fxquant.ir.graph import info
from tests.architectures import ARCHITECTURES, token_ids
from tests.more_architectures import MORE

HERE: Final = Path(__file__).parent
PAGE: Final = HERE.parent / "docs" / "architectures.md"
MAJORS: Final = ("4", "5")
EVERY: Final = {**ARCHITECTURES, **MORE}
Step = Callable[[GraphModule], object]

_TEXT: Final = """# Architectures

What was tried on each, with tiny random models (2 layers, width 32) under both versions of
transformers. `traces`: by which front end (docs/ir.md), and the graph agrees with the model.
`smooth` (`w8a8-static:absmax+smooth`), `rotate` (`w8+rotate`), `attn8`
(`w8a8-dynamic+attn8`): converted and run. `save`: a `w8a8-dynamic-token` graph saved, loaded
and run to the same bits. `export`: a `w8` graph as a compressed-tensors checkpoint,
which transformers loads and which gives the same logits (docs/exports.md). A number is the
reason, below.
`python -m benchmarks.architectures_table` tries them again, in either environment.
"""


def save_and_load(graph: GraphModule) -> None:
    """Raises AssertionError where the loaded graph gives other bits."""
    quantized = fxquant.convert(graph, "w8a8-dynamic-token")
    with tempfile.TemporaryDirectory() as folder:
        fxquant.save(quantized, Path(folder) / "saved")
        loaded = fxquant.load(Path(folder) / "saved")
    ids = token_ids(2, 9)
    assert torch.equal(loaded(input_ids=ids), quantized(input_ids=ids))


def exported(graph: GraphModule) -> None:
    """Raises ExportError where the engine gives other logits."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            fxquant.exports.compressed_tensors(graph, Path(folder) / "export", scheme="w8")
        except ExportError as error:
            if folder in str(error):  # with figures that depend on the machine
                said = "compressed-tensors: the engine gives other logits, so nothing is written"
                raise ExportError(said) from error
            raise


def converted(scheme: str) -> Step:
    """Converts by ``scheme`` and runs the result."""

    def step(graph: GraphModule) -> None:
        quantized = fxquant.convert(graph, scheme, calibration=[token_ids(2, 12, seed=4)])
        assert bool(torch.isfinite(quantized(input_ids=token_ids(2, 9))).all())

    return step


STEPS: Final[Mapping[str, Step]] = {
    "smooth": converted("w8a8-static:absmax+smooth"),
    "rotate": converted("w8+rotate"),
    "attn8": converted("w8a8-dynamic+attn8"),
    "save": save_and_load,
    "export": exported,
}


def tried(build: Callable[[], PreTrainedModel]) -> dict[str, str]:
    """Each column's cell: "yes", the front end's name, or the first line of the error."""
    try:
        graph = fxquant.trace(build())
    except FxquantError as error:
        return {"traces": _reason(error)}
    cells = {"traces": info(graph).frontend.partition(" ")[0].strip(",;:")}
    for name, step in STEPS.items():
        try:
            step(graph)
        except FxquantError as error:
            cells[name] = _reason(error)
        else:
            cells[name] = "yes"
    return cells


def _reason(error: FxquantError) -> str:
    """Its first line, without a temporary folder's name, which is another one each time."""
    return re.sub(r"\S+/\.export\.partial-\w+", "the export", str(error).partition("\n")[0])


@torch.no_grad()
def measure() -> dict[str, object]:
    bar = tqdm(EVERY.items(), "architectures", disable=None)
    return {
        "versions": versions(),
        "architectures": {name: tried(build) for name, build in bar},
    }


def kept(major: str) -> Path:
    return HERE / f"architectures-{major}.json"


def render() -> str:
    """The page from the kept files of both majors."""
    parts = [_TEXT]
    for major in MAJORS:
        data = json.loads(kept(major).read_text())
        made = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
        reasons: dict[str, int] = {}
        rows = []
        for name, cells in data["architectures"].items():
            row = [_cell(cells.get(column, ""), reasons) for column in ("traces", *STEPS)]
            rows.append([name, *row])
        table = tabulate(rows, ("", "traces", *STEPS), "github", disable_numparse=True)
        notes = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
        parts.append(f"## transformers {major}\n\n{made}\n\n{table}\n\n{notes}\n")
    return "\n".join(parts)


def _cell(text: str, reasons: dict[str, int]) -> str:
    if text in ("", "yes", "HFTracer", "recorder"):
        return text
    return str(reasons.setdefault(text, len(reasons) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="the page alone")
    if not parser.parse_args().render:
        major = transformers.__version__.partition(".")[0]
        write_text(kept(major), json.dumps(measure(), indent=1) + "\n")
    if all(kept(major).exists() for major in MAJORS):
        write_text(PAGE, render())
    else:
        print("the page needs both environments' files", file=sys.stderr)


if __name__ == "__main__":
    main()
