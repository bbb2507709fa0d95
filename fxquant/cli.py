"""The command line: ``fxquant evaluate | sweep | table | reproduce``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from fxquant.errors import FxquantError
from fxquant.evaluation import commands as commands_of_sweeps
from fxquant.evaluation.arguments import INTERRUPTED, add_arguments, evaluate_command

FAILED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors of fxquant become one message on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="fxquant", description=__doc__)
    commands = parser.add_subparsers(dest="command_name", required=True, metavar="COMMAND")
    evaluate = commands.add_parser("evaluate", help="loss and perplexity of a model per scheme")
    add_arguments(evaluate)
    evaluate.set_defaults(run=evaluate_command)
    sweep = commands.add_parser("sweep", help="models x schemes x datasets x seeds, resumable")
    commands_of_sweeps.add_sweep_arguments(sweep)
    sweep.set_defaults(run=commands_of_sweeps.sweep_command)
    table = commands.add_parser("table", help="tables of a sweep's results beside published ones")
    commands_of_sweeps.add_table_arguments(table)
    table.set_defaults(run=commands_of_sweeps.table_command)
    preset = commands.add_parser("reproduce", help="run a reference table again")
    commands_of_sweeps.add_reproduce_arguments(preset)
    preset.set_defaults(run=commands_of_sweeps.reproduce_command)
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    options.command = shlex.join([parser.prog, *arguments])
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("fxquant: interrupted before the first result", file=sys.stderr)
        return INTERRUPTED
    except FxquantError as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        print(f"fxquant: error: {error}{notes}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
