"""The command lines of ``fxquant sweep``, ``fxquant table`` and ``fxquant reproduce``."""

from __future__ import annotations

import argparse
from pathlib import Path

from fxquant.cli.arguments import add_cache_argument, add_level_argument, place, whole, window_count
from fxquant.cli.signals import INTERRUPTED
from fxquant.errors import DataError
from fxquant.evaluation.journal import read_journal
from fxquant.evaluation.models import DTYPES
from fxquant.evaluation.presets import PRESETS, reproduce
from fxquant.evaluation.result_notes import tokenizer_notes
from fxquant.evaluation.results import RESULTS, TABLE
from fxquant.evaluation.sweep import SweepOutcome, run_sweep
from fxquant.evaluation.sweep_file import read_sweep
from fxquant.evaluation.sweep_tables import check_format, format_results
from fxquant.evaluation.tables import LEGEND
from fxquant.ir.counted import counted

JOURNAL = "results.jsonl"
SOME_FAILED = 1


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=place, metavar="FILE.toml", help="docs/evaluation.md")
    parser.add_argument(
        "--output", type=place, help=f"folder of {JOURNAL} (results/NAME for NAME.toml)"
    )
    _add_retry(parser)


def _add_retry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--retry-failed", action="store_true", help="do failed cells again")


def sweep_command(options: argparse.Namespace) -> int:
    """Do what is missing, print the table; 1 if a cell failed, 130 after an interruption."""
    sweep = read_sweep(options.file, options.command)
    path = (options.output or Path("results") / options.file.stem) / JOURNAL
    try:
        outcome = run_sweep(sweep, path, retry_failed=options.retry_failed)
    except KeyboardInterrupt:
        return _interrupted(path)
    print(f"\n{format_results(outcome.results)}\n\n{LEGEND}")
    for note in tokenizer_notes(outcome.results):
        print(f"\n{note}")
    return _finish(outcome, path)


def _interrupted(path: Path) -> int:
    print(f"interrupted: finished cells are in {path}; the same command goes on from there")
    return INTERRUPTED


def _finish(outcome: SweepOutcome, path: Path) -> int:
    print(f"\nwritten to {path}")
    if outcome.failed:
        cells = counted(len(outcome.results), "cell")
        print(f"{outcome.failed} of {cells} failed; --retry-failed: again")
    return SOME_FAILED if outcome.failed else 0


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", type=place, nargs="+", metavar=JOURNAL, help="of a sweep, or its folder"
    )
    parser.add_argument(
        "--format", default="github", help="github (default), latex, csv, ...: tabulate's formats"
    )


def table_command(options: argparse.Namespace) -> int:
    """Print the tables of one or more results.jsonl."""
    check_format(options.format)
    read = [result for path in options.results for result in read_journal(_journal(path))]
    results = {result.fingerprint: result for result in read}.values()
    try:
        text = format_results(results, options.format)
    except DataError as error:  # results that do not go together
        raise DataError(f"{', '.join(map(str, options.results))}: {error}") from error
    print(text)
    for note in [LEGEND, *tokenizer_notes(results)] if options.format != "csv" else []:
        print(f"\n{note}")
    return 0


def _journal(path: Path) -> Path:
    """The results.jsonl that is meant. Raises DataError for what an evaluation wrote instead."""
    written = path / JOURNAL if path.is_dir() else path
    single = written.with_name(RESULTS)
    if single.is_file() and (path == single or not written.exists()):
        raise DataError(
            f"{single} is one evaluation, whose table is beside it, in {TABLE}: fxquant table "
            f"takes the {JOURNAL} of a sweep, fxquant report {single.parent} shows either"
        )
    return written


def add_reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("preset", choices=tuple(PRESETS), help="the table to run again")
    add("--model", nargs="+", dest="models", help="directories or names, instead of the preset's")
    add("--data", type=place, help="folder with clones of hub datasets: DATA/OWNER/NAME")
    add("--dataset", metavar="NAME_OR_PATH", help="another text; differences still compare")
    add(
        "--calibration-dataset",
        metavar="NAME_OR_PATH",
        help="another text to calibrate on (that of --dataset, where given)",
    )
    add(
        "--windows",
        type=window_count,
        default=argparse.SUPPRESS,
        help="to evaluate, or all (the preset's)",
    )
    add("--length", type=whole, help="tokens a window (the preset's)")
    add("--calibration-windows", type=whole, help="for calibration (the preset's)")
    add(
        "--calibration-length",
        type=whole,
        help="tokens of a calibration window (the preset's; of a shorter length, that)",
    )
    add("--batch-size", type=whole, help="dynamic ranges depend on it (1)")
    add("--seeds", type=whole, nargs="+", help="draw the calibration windows (0)")
    add("--device", help="cpu (default) or cuda")
    add_level_argument(parser)
    add("--dtype", choices=("auto", *DTYPES), help="auto (default): stored on CUDA, else fp32")
    add("--revision", help="of a hub model")
    add("--stream", action="store_true", help="leave weights in their files: larger than memory")
    add_cache_argument(parser)
    add("--output", type=place, help="folder to keep and resume results (results/PRESET)")
    _add_retry(parser)


_NOT_OF_THE_SWEEP = ("command_name", "run", "preset", "output", "retry_failed")


def reproduce_command(options: argparse.Namespace) -> int:
    """Run a preset; 1 if a cell failed, 130 after an interruption."""
    changes = {k: v for k, v in vars(options).items() if k not in _NOT_OF_THE_SWEEP}
    if options.dataset is not None and options.calibration_dataset is None:
        changes["calibration_dataset"] = options.dataset
    folder = options.output or Path("results") / options.preset
    try:
        outcome = reproduce(options.preset, changes, folder, retry_failed=options.retry_failed)
    except KeyboardInterrupt:
        return _interrupted(folder / JOURNAL)
    return _finish(outcome, folder / JOURNAL)
