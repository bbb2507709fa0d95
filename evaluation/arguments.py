"""The command line of ``fxquant evaluate``."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from fxquant.distributed import is_main, session
from fxquant.evaluation.job import Job, Outcome, run
from fxquant.evaluation.models import DTYPES
from fxquant.evaluation.tables import format_table, sentences

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="hub name, directory (also of fxquant.save) or package:NAME"
    )
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument(
        "--schemes",
        nargs="+",
        default=[],
        help="such as w8 w8a8-static: docs/schemes.md; none for a saved graph",
    )
    parser.add_argument(
        "--stream", action="store_true", help="leave weights in their files: larger than memory"
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--dataset", choices=("wikitext2",), help="evaluate on a dataset")
    text.add_argument("--text", default="builtin", help="a UTF-8 file, or builtin (default)")
    parser.add_argument("--windows", type=int, default=8, help="to evaluate (8)")
    parser.add_argument("--length", type=int, default=512, help="tokens a window (512)")
    parser.add_argument("--batch-size", type=int, default=1, help="dynamic ranges depend on it (1)")
    parser.add_argument(
        "--calibration-windows", type=int, default=16, help="for static ranges (16)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", *DTYPES), help="auto: stored on CUDA, else fp32"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration windows (0)")
    parser.add_argument("--output", type=Path, help="folder for results.json and table.md")
    parser.add_argument("--overwrite", action="store_true", help="replace an unfinished run there")


def evaluate_command(options: argparse.Namespace) -> int:
    """Run the job, print table, provenance and sentences; 130 after an interruption."""
    fields = {name: value for name, value in vars(options).items() if name in Job.__match_args__}
    command = shlex.join(["fxquant", "evaluate", *sys.argv[_arguments_start() :]])
    job = Job(**{**fields, "schemes": tuple(options.schemes), "command": command})
    with session(job.device) as device:
        job = replace(job, device=device, output=job.output if is_main() else None)
        outcome = run(job)
        return _print(job, outcome) if is_main() else 0


def _print(job: Job, outcome: Outcome) -> int:
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


def _arguments_start() -> int:
    """Where the options begin in sys.argv: behind "evaluate" or the module's own name."""
    return 2 if len(sys.argv) > 1 and sys.argv[1] == "evaluate" else 1
