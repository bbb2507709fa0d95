"""The command line of ``fxquant evaluate``."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import replace
from pathlib import Path

from fxquant.cli.signals import INTERRUPTED
from fxquant.errors import DataError
from fxquant.evaluation.datasets import NAMED, tokenizer_note
from fxquant.evaluation.gguf import weights_note
from fxquant.evaluation.job import Job, run
from fxquant.evaluation.models import DTYPES
from fxquant.evaluation.results import row_notes
from fxquant.evaluation.rows import Outcome
from fxquant.evaluation.tables import LEGEND, format_table, sentences
from fxquant.exports.runtimes import RUNTIMES
from fxquant.files.doors import as_path, printable
from fxquant.recipes.running import RUNNING
from fxquant.run.distributed import is_main, session


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, where, in which dtype."""
    add = parser.add_argument
    add("--model", required=True, help="hub name, directory (of fxquant.save too), package:NAME")
    add("--revision", help="of a hub model")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add(
        "--dtype", default="auto", choices=("auto", *DTYPES), help="auto: stored on CUDA, else fp32"
    )


def add_text_arguments(parser: argparse.ArgumentParser, length: int = 512) -> None:
    """Which text, and how calibration windows are drawn from it."""
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--dataset",
        metavar="NAME_OR_PATH",
        help=f"builtin, {', '.join(NAMED)}, a text or parquet file, a folder of save_to_disk",
    )
    text.add_argument("--text", default="builtin", help="a UTF-8 file, or builtin (default)")
    add = parser.add_argument
    add("--data", type=place, help="folder with clones of hub datasets: DATA/OWNER/NAME")
    add("--length", type=whole, default=length, help=f"tokens a window ({length})")
    add("--calibration-windows", type=whole, default=16, help="for calibration (16)")
    add("--calibration-length", type=whole, help="tokens of a calibration window (length)")
    add("--calibration-dataset", metavar="NAME_OR_PATH", help="to calibrate on another dataset")
    add("--seed", type=whole, default=0, help="draws the calibration windows (0)")


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    """Where long repairs keep what is finished."""
    parser.add_argument(
        "--cache", type=place, help="folder where gptq and refine keep finished blocks, to go on"
    )


def add_tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    """Whether what is written holds the model's tokenizer."""
    parser.add_argument(
        "--no-tokenizer",
        action="store_false",
        dest="tokenizer",
        help="leave the model's tokenizer out; it is read only where text is",
    )


def tokenizer_line(options: argparse.Namespace, tokenizer: object) -> str:
    """What there is to say where ``tokenizer``, None for none, was asked for and not written."""
    if tokenizer is not None or not options.tokenizer:
        return ""
    return f"no tokenizer is written: none is found in {options.model}"


def add_level_argument(parser: argparse.ArgumentParser) -> None:
    """At which level quantized graphs are run."""
    parser.add_argument(
        "--level",
        default="auto",
        choices=RUNNING,
        help="auto: kernels on CUDA, else integer; kernels-inexact: FP8 products by the device",
    )


def add_held_out_arguments(parser: argparse.ArgumentParser) -> None:
    """Which windows of the text are for an evaluation, so that nothing is calibrated on them."""
    add = parser.add_argument
    add(
        "--windows",
        type=window_count,
        default=8,
        help="kept for evaluation, not calibrated on, or all (8)",
    )
    add("--stride", type=whole, help="of these windows (length)")
    _add_allow_overlap(parser)


def _add_allow_overlap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-overlap",
        action="store_true",
        help="go on where windows to evaluate were calibrated on; it is said beside the figures",
    )


def add_window_arguments(parser: argparse.ArgumentParser) -> None:
    """Which windows to evaluate."""
    add = parser.add_argument
    add("--windows", type=window_count, default=8, help="to evaluate, or all (8)")
    add("--stride", type=whole, help="from window to window; only new tokens are scored (length)")
    add("--batch-size", type=whole, default=1, help="dynamic ranges depend on it (1)")
    _add_allow_overlap(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--schemes",
        nargs="+",
        default=[],
        help="such as w8 w8a8-static FILE.json: docs/schemes.md; none for a saved graph",
    )
    parser.add_argument(
        "--stream", action="store_true", help="leave weights in their files: larger than memory"
    )
    parser.add_argument(
        "--runtime",
        choices=tuple(RUNTIMES),
        help="also export, run that in this engine and set its row beside the graph's; --model may "
        "be an export then",
    )
    add_text_arguments(parser)
    add_window_arguments(parser)
    add_level_argument(parser)
    add_cache_argument(parser)
    parser.add_argument("--output", type=place, help="folder for results.json and table.md")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is there")


def whole(text: str) -> int:
    """A whole number in plain digits: what is printed is then what was typed."""
    if not re.fullmatch(r"[-+]?[0-9]{1,20}", text):
        raise argparse.ArgumentTypeError(f"{printable(text[:40])!r} is no whole number")
    return int(text)


def place(text: str) -> Path:
    """A path that can be looked at, whatever is there."""
    try:
        return as_path(text, "the path")
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def number(text: str) -> float:
    """A finite number in plain digits."""
    value = float(text) if re.fullmatch(r"[-+.0-9eE]{1,40}", text) else math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{printable(text[:40])!r} is no finite number")
    return value


def window_count(text: str) -> int | None:
    """A number, or None for "all"."""
    return None if text == "all" else whole(text)


def job_of(options: argparse.Namespace, schemes: tuple[str, ...]) -> Job:
    """The job that the options describe."""
    fields = {name: value for name, value in vars(options).items() if name in Job.__match_args__}
    return Job(**{**fields, "schemes": schemes})


def evaluate_command(options: argparse.Namespace) -> int:
    """Run the job, print table, provenance and sentences; 130 after an interruption."""
    job = job_of(options, tuple(options.schemes))
    with session(job.device) as device:
        job = replace(job, device=device, output=job.output if is_main() else None)
        outcome = run(job)
        return _print(job, outcome) if is_main() else 0


def _print(job: Job, outcome: Outcome) -> int:
    if outcome.rows:
        print(format_table(outcome.rows))
        notes = row_notes(outcome.rows, outcome.provenance)
        print("\n" + "\n\n".join([LEGEND, outcome.provenance.line(), *notes]))
        if job.output is not None:
            print(f"written to {job.output}")
    if not outcome.complete:
        return INTERRUPTED
    print()
    made = outcome.provenance
    notes = [tokenizer_note(made.model, made.protocol), weights_note(made.model, made.weights)]
    for sentence in [*sentences(outcome.rows), *filter(None, notes)]:
        print(sentence)
    return 0
