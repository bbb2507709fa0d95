"""The command line of ``fxquant evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from fxquant.evaluation.datasets import NAMED
from fxquant.evaluation.job import Job, run
from fxquant.evaluation.models import DTYPES
from fxquant.evaluation.tables import format_table, sentences

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="hub name, directory or package:NAME")
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument(
        "--schemes", nargs="+", required=True, help="such as w8 w8a8-static: docs/schemes.md"
    )
    add_setting(parser)
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration windows (0)")
    parser.add_argument("--output", type=Path, help="folder for results.json and table.md")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is there")


def add_setting(parser: argparse.ArgumentParser) -> None:
    """Text, windows and device: what all schemes of a run share."""
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--dataset",
        metavar="NAME_OR_PATH",
        help=f"builtin, {', '.join(NAMED)}, a text or parquet file, a folder of save_to_disk",
    )
    text.add_argument("--text", default="builtin", help="a UTF-8 file, or builtin (default)")
    add = parser.add_argument
    add("--data", type=Path, help="folder with clones of hub datasets: DATA/OWNER/NAME")
    add("--windows", type=window_count, default=8, help="to evaluate, or all (8)")
    add("--length", type=int, default=512, help="tokens a window (512)")
    add("--stride", type=int, help="from window to window; only new tokens are scored (length)")
    add("--batch-size", type=int, default=1, help="dynamic ranges depend on it (1)")
    add("--calibration-windows", type=int, default=16, help="for static ranges (16)")
    add("--calibration-length", type=int, help="tokens of a calibration window (length)")
    add("--calibration-dataset", metavar="NAME_OR_PATH", help="to calibrate on another dataset")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add(
        "--dtype", default="auto", choices=("auto", *DTYPES), help="auto: stored on CUDA, else fp32"
    )


def window_count(text: str) -> int | None:
    """A number, or None for "all"."""
    return None if text == "all" else int(text)


def evaluate_command(options: argparse.Namespace) -> int:
    """Run the job, print table, provenance and sentences; 130 after an interruption."""
    fields = {name: value for name, value in vars(options).items() if name in Job.__match_args__}
    job = Job(**{**fields, "schemes": tuple(options.schemes)})
    outcome = run(job)
    if outcome.rows:
        print(format_table(outcome.rows))
        print(f"\n{outcome.provenance.line()}")
        if job.output is not None:
            print(f"written to {job.output}")
    if not outcome.complete:
        return INTERRUPTED
    print()
    for sentence in sentences(outcome.rows):
        print(sentence)
    return 0
