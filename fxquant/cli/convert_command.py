"""``fxquant convert``: convert a model, printing the graph after passes as they run."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from torch.fx import GraphModule

from fxquant.analysis.inspection.inspection import inspect
from fxquant.analysis.inspection.suggest import unknown
from fxquant.checkpoint.save_load import check_target, save
from fxquant.checkpoint.target import held_target
from fxquant.cli.arguments import (
    add_cache_argument,
    add_held_out_arguments,
    add_model_arguments,
    add_text_arguments,
    add_tokenizer_argument,
    place,
    tokenizer_line,
)
from fxquant.cli.converting import convert_as_asked
from fxquant.errors import CheckpointError
from fxquant.ir.graph import Level, info
from fxquant.ir.streamed import workspace_folder
from fxquant.pipeline.pipeline import AfterPass, Pass
from fxquant.recipes import conversion
from fxquant.recipes.conversion import LEVELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--scheme", required=True, help="such as w8a8-static, or FILE.json: docs/schemes.md"
    )
    parser.add_argument(
        "--level", default="integer", choices=LEVELS, help="where to stop (integer)"
    )
    add_text_arguments(parser)
    add_held_out_arguments(parser)
    add_cache_argument(parser)
    add_tokenizer_argument(parser)
    parser.add_argument("--output", type=place, help="folder for fxquant.save")
    parser.add_argument(
        "--stream", action="store_true", help="leave weights in their files: larger than memory"
    )
    parser.add_argument(
        "--print-after",
        metavar="all|PASS,...",
        default="",
        help="print the graph after these passes, as they run",
    )


def run(options: argparse.Namespace) -> int:
    wanted = [name for name in options.print_after.split(",") if name]
    check_names([name for name in wanted if name != "all"], options)
    check_output(options)
    after_pass = dump_after(wanted, print) if wanted else None
    with held_target(options.output), workspace_folder() as workspace:
        keeps = options.tokenizer and options.output is not None
        converted = convert_as_asked(options, after_pass, workspace, keeps_tokenizer=keeps)
        if options.output is not None:
            save(converted.graph, options.output, converted.tokenizer)
        print(inspect(converted.graph))
    if options.output is not None:
        said = [tokenizer_line(options, converted.tokenizer), f"written to {options.output}"]
        print("\n".join(filter(None, said)))
    return 0


def check_names(wanted: list[str], options: argparse.Namespace) -> None:
    """Raise InspectionError for a pass that the scheme will not run, before any work."""
    steps = conversion.recipe(options.scheme, calibration=[None], level=options.level).sequence  # type: ignore[list-item]
    known = [step.name for step in steps]
    for name in wanted:
        if name not in known:
            raise unknown("pass", name, known)


def check_output(options: argparse.Namespace) -> None:
    """Raise CheckpointError where the result could not be written, before any work."""
    if options.output is None:
        return
    check_target(options.output)
    if options.level == Level.OBSERVED:
        raise CheckpointError(
            "--output: an observed graph holds statistics, which are not saved; leave out "
            "--output or give another --level"
        )
    if options.level in (Level.KERNELS, Level.INEXACT):
        raise CheckpointError(
            f"--output: a graph of level {options.level} is not saved; leave out --output, or give "
            "--level integer, from which fxquant evaluate --level and fxquant.passes make it again"
        )


def dump_after(wanted: list[str], say: Callable[[str], None]) -> AfterPass:
    """A callback that prints the graph after the wanted passes, headed by the pass."""

    def after(step: Pass, gm: GraphModule) -> None:
        if "all" in wanted or step.name in wanted:
            count = len(info(gm).history)
            say(f"=== after pass {count}, {step}\n{inspect(gm).graph()}\n")

    return after
