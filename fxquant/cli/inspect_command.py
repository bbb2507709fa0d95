"""``fxquant inspect``: convert a model and print what there is to see."""

from __future__ import annotations

import argparse
import json
import sys

from torch.fx import GraphModule

from fxquant.analysis.inspection.inspection import Inspection, inspect
from fxquant.checkpoint.save_load import load
from fxquant.cli.arguments import (
    add_held_out_arguments,
    add_model_arguments,
    add_text_arguments,
    place,
    whole,
)
from fxquant.cli.convert_command import check_names
from fxquant.cli.converting import convert_as_asked
from fxquant.evaluation.starting import saved_graph
from fxquant.recipes.conversion import LEVELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--scheme",
        help="such as w8a8-static, or FILE.json: docs/schemes.md; none: a saved graph as it is",
    )
    parser.add_argument(
        "--level", default="integer", choices=LEVELS, help="where to stop (integer)"
    )
    add_text_arguments(parser)
    add_held_out_arguments(parser)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--layer", type=whole, metavar="N", help="list decoder block N")
    shown.add_argument("--graph", action="store_true", help="list the whole graph")
    shown.add_argument("--diff", metavar="PASS", help="what a pass changed")
    shown.add_argument("--site", metavar="PATH", help="one site, or the end of its path")
    shown.add_argument("--all", action="store_true", help="the summary, every site by itself")
    parser.add_argument(
        "--format",
        default="text",
        choices=("text", "markdown", "json"),
        help="text (default); json of the summary is what fxquant report reads",
    )
    parser.add_argument(
        "--dot",
        type=place,
        metavar="FILE",
        help="also write Graphviz of the block (of --layer, else 0); FILE.svg needs fxquant[graph]",
    )


def run(options: argparse.Namespace) -> int:
    if options.scheme is None:
        found = inspect(_saved(options))
    else:
        check_names([options.diff] if options.diff else [], options)
        found = inspect(convert_as_asked(options, None).graph)
    print(render(found, options))
    if options.dot is not None:
        found.write_dot(options.dot, options.layer or 0)
        print(f"written to {options.dot}", file=sys.stderr)  # stdout may be a file of JSON
    return 0


def _saved(options: argparse.Namespace) -> GraphModule:
    advice = "give --scheme, such as w8a8-static, to see what it becomes (fp: the traced model)"
    return load(saved_graph(options.model, advice), options.device)


def render(found: Inspection, options: argparse.Namespace) -> str:
    """What the options ask for, in the format they ask for."""
    listing = _listing(found, options)
    if options.format == "json":
        data = found.to_dict() if listing is None else {"text": listing.split("\n")}
        return json.dumps(data, indent=2, allow_nan=False)
    markdown = options.format == "markdown"
    if listing is None:
        return found.summary(fold=not options.all, markdown=markdown)
    language = "diff" if options.diff else "text"
    return f"```{language}\n{listing}\n```" if markdown else listing


def _listing(found: Inspection, options: argparse.Namespace) -> str | None:
    """The listing asked for, None for the summary."""
    if options.layer is not None:
        return found.layer(options.layer)
    if options.diff is not None:
        return found.diff(options.diff)
    if options.site is not None:
        return found.site(options.site)
    return found.graph() if options.graph else None
