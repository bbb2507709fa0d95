"""The command line: each command's options and code are in a file of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fxquant import convert_command, inspect_command
from fxquant.errors import FxquantError
from fxquant.evaluation.arguments import INTERRUPTED, add_arguments, evaluate_command

FAILED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors of fxquant become one message on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="fxquant", description="Quantize, look, measure.")
    commands = parser.add_subparsers(dest="command_name", required=True, metavar="COMMAND")
    evaluate = commands.add_parser("evaluate", help="loss and perplexity of a model per scheme")
    add_arguments(evaluate)
    evaluate.set_defaults(run=evaluate_command)
    inspect = commands.add_parser("inspect", help="what a quantized model computes, and why")
    inspect_command.add_arguments(inspect)
    inspect.set_defaults(run=inspect_command.run)
    convert = commands.add_parser("convert", help="convert a model, printing passes as they run")
    convert_command.add_arguments(convert)
    convert.set_defaults(run=convert_command.run)
    options = parser.parse_args(argv)
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
