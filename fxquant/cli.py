"""The command line: ``fxquant evaluate | explain | plan``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fxquant.analysis_commands import (
    add_explain_arguments,
    add_plan_arguments,
    explain_command,
    plan_command,
)
from fxquant.errors import FxquantError
from fxquant.evaluation.arguments import INTERRUPTED, add_arguments, evaluate_command

FAILED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors of fxquant become one message on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="fxquant", description=__doc__)
    commands = parser.add_subparsers(dest="command_name", required=True, metavar="COMMAND")
    evaluate = commands.add_parser("evaluate", help="loss and perplexity of a model per scheme")
    add_arguments(evaluate)
    evaluate.set_defaults(run=evaluate_command)
    explained = commands.add_parser("explain", help="where the loss comes from, and why")
    add_explain_arguments(explained)
    explained.set_defaults(run=explain_command)
    planned = commands.add_parser("plan", help="per-site choices under a budget of loss")
    add_plan_arguments(planned)
    planned.set_defaults(run=plan_command)
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
