"""``fxquant export``: write what another engine loads, and show that it computes the same."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from fxquant.checkpoint.save_load import load
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
from fxquant.cli.converting import Converted, convert_as_asked
from fxquant.errors import DataError, ExportError
from fxquant.evaluation.models import LoadedModel, read_saved_tokenizer
from fxquant.evaluation.starting import saved_graph
from fxquant.exports.folder import output_folder
from fxquant.exports.table import FORMATS, Format
from fxquant.exports.target import check_possible, refusing
from fxquant.ir.graph import Level, info
from fxquant.ir.streamed import workspace_folder
from fxquant.schemes.scheme import as_scheme


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, choices=tuple(FORMATS), help="the format")
    add_model_arguments(parser)
    parser.add_argument(
        "--scheme",
        help="such as w4-g128, or FILE.json: docs/schemes.md; none: a saved graph as it is",
    )
    add_text_arguments(parser)
    add_held_out_arguments(parser)
    add_cache_argument(parser)
    parser.add_argument("--output", type=place, required=True, help="folder for what is written")
    parser.add_argument(
        "--stream", action="store_true", help="leave weights in their files: larger than memory"
    )
    add_tokenizer_argument(parser)
    parser.add_argument(
        "--no-check",
        action="store_false",
        dest="check",
        help="do not load what was written and compare its logits",
    )


def run(options: argparse.Namespace) -> int:
    format_ = FORMATS[options.to]
    check_possible(format_.target, options.stream)
    output_folder(options.output)
    with held_target(options.output, ExportError), workspace_folder() as workspace:
        if options.scheme is None:
            found = _saved(options)
        else:
            found = _converted(options, format_, workspace)
        exported = format_.export(
            found.graph,
            options.output,
            tokenizer=found.tokenizer,
            generation_config=found.generation_config,
            check=options.check,
            calibration=found.calibration,
            scheme="fp" if info(found.graph).level == Level.FLOAT else None,
        )
    said = [str(exported), tokenizer_line(options, found.tokenizer)]
    print("\n".join(filter(None, said)))
    return 0


def _of_conversions(options: argparse.Namespace) -> Iterator[tuple[str, object, object]]:
    """The options that only a conversion reads: name, what was given, and what is usual."""
    parser = argparse.ArgumentParser(add_help=False)
    for add in (add_text_arguments, add_held_out_arguments, add_cache_argument):
        add(parser)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--revision")
    for name, usual in vars(parser.parse_args([])).items():
        yield f"--{name.replace('_', '-')}", getattr(options, name), usual


def _converted(options: argparse.Namespace, format_: Format, workspace: Path) -> Converted:
    scheme = as_scheme(options.scheme)
    reads_data = format_.target.reads_calibration(scheme)
    target = format_.target.given(options.calibration_windows or None if reads_data else None)
    options.level = target.level
    after_pass = refusing(target, scheme)

    def check(loaded: LoadedModel) -> None:
        tokenizer = loaded.own_tokenizer if options.tokenizer else None
        if tokenizer is not None and target.check_tokenizer is not None:
            target.check_tokenizer(tokenizer, loaded.model)

    return convert_as_asked(
        options, after_pass, workspace, check, reads_data, keeps_tokenizer=options.tokenizer
    )


def _saved(options: argparse.Namespace) -> Converted:
    folder = saved_graph(options.model, "give --scheme, such as w4-g128")
    named = [name for name, value, usual in _of_conversions(options) if value != usual]
    if named:
        raise DataError(
            f"{folder} is a saved graph, of which no text, seed or dtype changes anything: leave "
            f"out {' and '.join(named)}"
        )
    graph = load(folder, options.device, stream=options.stream)
    return Converted(graph, read_saved_tokenizer(folder) if options.tokenizer else None)
