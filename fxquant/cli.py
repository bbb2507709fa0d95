"""The command line: ``fxquant evaluate`` and ``fxquant report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fxquant.errors import FxquantError
from fxquant.evaluation.arguments import INTERRUPTED, add_arguments, evaluate_command
from fxquant.evaluation.report import command as report_cli

FAILED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors of fxquant become one message on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="fxquant", description=__doc__)
    commands = parser.add_subparsers(dest="command_name", required=True, metavar="COMMAND")
    evaluate = commands.add_parser("evaluate", help="loss and perplexity of a model per scheme")
    add_arguments(evaluate)
    evaluate.set_defaults(run=evaluate_command)
    report = commands.add_parser("report", help="a results folder as one HTML page")
    report_cli.add_arguments(report)
    report.set_defaults(run=report_cli.report_command)
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
