"""The command line: each command's options and code are in a file of its own."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from fxquant.cli import analysis_commands as analyses
from fxquant.cli import convert_command, export_command, inspect_command
from fxquant.cli import report_command as report
from fxquant.cli import safetensors_command as safetensors
from fxquant.cli import sweep_commands as sweeps
from fxquant.cli.arguments import add_arguments, evaluate_command
from fxquant.cli.signals import INTERRUPTED, signal_name, terminable
from fxquant.cli.terminal import printing, saying
from fxquant.errors import FxquantError, notes_of
from fxquant.files.doors import is_utf8, printable

FAILED = 2
_LONG: Final = re.compile(r"(\S{60})\S{140,}")  # a value that is no option's


@dataclass(frozen=True)
class Command:
    """A subcommand: its options, and what runs on them and returns the exit code."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = (
    Command(
        "evaluate",
        "loss and perplexity of a model per scheme",
        add_arguments,
        evaluate_command,
    ),
    Command(
        "convert",
        "convert a model, printing passes as they run",
        convert_command.add_arguments,
        convert_command.run,
    ),
    Command(
        "export",
        "write a quantized model for another engine, checked",
        export_command.add_arguments,
        export_command.run,
    ),
    Command(
        "inspect",
        "what a quantized model computes, and why",
        inspect_command.add_arguments,
        inspect_command.run,
    ),
    Command(
        "explain",
        "where the loss comes from, and why",
        analyses.add_explain_arguments,
        analyses.explain_command,
    ),
    Command(
        "plan",
        "per-site choices under a budget of loss or of bits",
        analyses.add_plan_arguments,
        analyses.plan_command,
    ),
    Command(
        "sweep",
        "models x schemes x datasets x seeds, resumable",
        sweeps.add_sweep_arguments,
        sweeps.sweep_command,
    ),
    Command(
        "table",
        "tables of a sweep's results beside published ones",
        sweeps.add_table_arguments,
        sweeps.table_command,
    ),
    Command(
        "reproduce",
        "run a reference table again",
        sweeps.add_reproduce_arguments,
        sweeps.reproduce_command,
    ),
    Command(
        "report",
        "a results folder as one HTML page",
        report.add_arguments,
        report.report_command,
    ),
    Command(
        "safetensors",
        "pytorch_model*.bin as files that --stream reads",
        safetensors.add_arguments,
        safetensors.run,
    ),
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with an option in one line, as fxquant's own errors do."""

    def error(self, message: str) -> NoReturn:
        said = _LONG.sub(r"\1...", printable(message))
        self.exit(FAILED, f"{self.prog}: error: {said} (options: {self.prog} -h)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors of fxquant become one message on stderr and exit code 2.

    An interruption ends with 130, SIGTERM, which is one too, with 143.
    """
    parser = _Parser(prog="fxquant", description="Quantize, look, measure.")
    commands = parser.add_subparsers(dest="command_name", required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = commands.add_parser(command.name, help=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    arguments = list(sys.argv[1:] if argv is None else argv)
    for argument in arguments:
        if "\0" in argument or not is_utf8(argument):
            parser.error(f"{argument!r} is no text: results could not name it")
        if argument.endswith("=--"):  # which argparse takes for no value at all
            parser.error(f"{argument} has no value")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # said by the command, whose -h has the known ones
        chosen = commands.choices[options.command_name]
        chosen.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.command = shlex.join([parser.prog, *arguments])
    with saying(), terminable() as received:
        return received.status(_run(options))


def _run(options: argparse.Namespace) -> int:
    try:
        with printing():
            return int(options.run(options))
    except KeyboardInterrupt as stop:
        name = signal_name(stop)
        print(f"fxquant: interrupted by {name} before the first result", file=sys.stderr)
        return INTERRUPTED
    except FxquantError as error:
        said = "\n".join(map(printable, f"{error}{notes_of(error)}".split("\n")))
        print(f"fxquant: error: {said}", file=sys.stderr)
        return FAILED
