"""Write the tables of README and docs from committed results:

    python -m benchmarks.readme_tables [--check]

A page marks where a table stands and which results it is made from, a path from the repository's
root; everything between the two marks is replaced:

    <!-- table: docs/results/demo/results.json -->
    <!-- /table -->

results.json (of ``fxquant evaluate``) gives table, provenance and sentences; results.jsonl (of a
sweep) gives its tables beside the published figures; a folder (of benchmarks/speed.py) a column for
each machine, beside its goals; streaming.json (of benchmarks/streaming.py) its runs under a memory
limit; weight_grids.json (of benchmarks/weight_grids.py) what grids make of a model's weights;
published.py the reference ladder, which is data in the package.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.cuda_table import page_table
from benchmarks.speed_table import column, measured, speed_rows
from fxquant.errors import DataError
from fxquant.evaluation.gguf import weights_note
from fxquant.evaluation.journal import read_journal
from fxquant.evaluation.published import LADDER, REFERENCE_LOSS, Published
from fxquant.evaluation.results import read_results
from fxquant.evaluation.sweep_tables import format_results
from fxquant.evaluation.tables import format_table, sentences
from fxquant.ir.calibration import version_words
from fxquant.ir.counted import counted

ROOT = Path(__file__).parent.parent
_MARKED = re.compile(r"(<!-- table: (?P<path>\S+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


def pages() -> list[Path]:
    """Where marks may stand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def table_of(path: Path) -> str:
    """The Markdown that stands for a file of results. Raises DataError if it is none."""
    if path.suffix == ".jsonl":
        return format_results(read_journal(path))
    if path.is_dir():
        return _machines(path)
    if path.name == "streaming.json":
        return streaming_tables(path)
    if path.name == "weight_grids.json":
        return grids_table(path)
    if path.name == "cuda.json":
        return cuda_table(path)
    if path.name == "published.py":
        return reference_table()
    rows, made = read_results(path)
    said = "\n".join(f"> {sentence}" for sentence in sentences(rows))
    past = weights_note(made.model, made.weights)
    parts = (format_table(rows), made.line(), f"`{made.command}`", said, past)
    return "\n\n".join(part for part in parts if part)


@contextlib.contextmanager
def _results(path: Path, script: str) -> Iterator[dict[str, Any]]:
    """What a benchmark wrote; DataError where the file, or what the block reads of it, is other."""
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is no result of benchmarks/{script}: {error!r}") from error


def _made(what: str, data: dict[str, Any]) -> str:
    """What was measured, and by what."""
    threads, versions = counted(data["threads"], "thread"), version_words(data["versions"])
    return f"{what}; {threads} on {data['processor']}; {versions}"


def _machines(folder: Path) -> str:
    """What benchmarks/speed.py measured, a column a machine, and what each column is."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise DataError(f"{folder} holds no result of benchmarks/speed.py")
    found = []
    for path in files:
        with _results(path, "speed.py") as data:
            speed_rows([data])  # all that is read of it
            found.append((data, f"{column(data)}: {_made(measured(data), data)}"))
    head, *body = speed_rows([data for data, _ in found])
    return "\n\n".join((_table(head, body), "\n".join(f"- {made}" for _, made in found)))


def streaming_tables(path: Path) -> str:
    """Schemes that ran under the memory limit, and streamed over in-memory time."""
    with _results(path, "streaming.py") as data:
        parts = [
            f"{_table(head, [line(row) for row in data[name]['rows']])}\n\n{_setting(data[name])}"
            for name, head, line in (
                ("limit", ("scheme", "loss", "limit, GB", "seconds"), _limit_row),
                ("cost", ("scheme", "in memory, s", "streamed, s", "ratio"), _cost_row),
            )
        ]
        return "\n\n".join(parts)


def _limit_row(row: dict[str, Any]) -> tuple[str, ...]:
    return row["scheme"], f"{row['loss']:.4f}", f"{row['limit_gb']:.2f}", f"{row['seconds']:.0f}"


def _cost_row(row: dict[str, Any]) -> tuple[str, ...]:
    memory, streamed = row["seconds"]
    return row["scheme"], f"{memory:.2f}", f"{streamed:.2f}", f"{row['streamed/in_memory']:.2f}"


def _setting(part: dict[str, Any]) -> str:
    what = (
        f"{part['model']}, computed in {part['compute_dtype']}; {part['windows']} windows of "
        f"{part['length']} random tokens, {part['calibration_windows']} to calibrate"
    )
    return _made(what, part)


def grids_table(path: Path) -> str:
    """How far each grid gives a model's weights back."""
    head = ("scheme", "equal", "within 1e-7", "SQNR, dB", "SQNR of spread weights, dB")
    with _results(path, "weight_grids.py") as data:
        body = [_grid_row(row) for row in data["rows"]]
        made = (
            f"{data['model']} ({data['revision'][:23]}), {data['linears']} linears, "
            f"{data['values']:,} weights {data['weights']}; " + version_words(data["versions"])
        )
        return f"{_table(head, body)}\n\n{made}"


def _grid_row(row: dict[str, Any]) -> tuple[str, ...]:
    sqnr = "exact" if row["sqnr"] is None else f"{row['sqnr']:.2f}"
    shares = (f"{row[name]:.2%}" for name in ("equal", "near"))
    return row["scheme"], *shares, sqnr, f"{row['sqnr_spread']:.2f}"


def reference_table() -> str:
    """The published ladder: losses, perplexities and differences from the float model."""
    head = ("scheme", "measured as", "reference loss", "reference ppl", "reference Δloss")
    return _table(head, [_reference_row(figure) for figure in LADDER])


def _reference_row(figure: Published) -> tuple[str, ...]:
    assert figure.delta_loss is not None
    loss = REFERENCE_LOSS + figure.delta_loss
    change = f"{figure.delta_loss:+.6f}" if figure.delta_loss else "0"
    perplexity = figure.perplexity or math.exp(loss)
    return str(figure.scheme), figure.method, f"{loss:.6f}", f"{perplexity:.4f}", change


def cuda_table(path: Path) -> str:
    """What benchmarks/cuda.py measured, or that it was not run."""
    if not path.exists():
        return "Not measured: `python -m benchmarks.cuda` on a machine with a CUDA device does it."
    with _results(path, "cuda.py") as data:
        return page_table(data)


def _table(head: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> str:
    align = ["left" if name in ("scheme", "measured as", "goal") else "right" for name in head]
    align[0] = "left"
    return tabulate(body, head, tablefmt="github", disable_numparse=True, colalign=align)


def with_tables(text: str, root: Path = ROOT) -> str:
    """A page's text with every marked table made anew from the results under ``root``."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{table_of(root / match['path'])}\n\n{match[4]}"

    return _MARKED.sub(replace, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a page is stale")
    check = parser.parse_args().check
    stale = [page for page in pages() if with_tables(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{page.name}: {'stale' if check else 'written'}")
        if not check:
            page.write_text(with_tables(page.read_text()))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
