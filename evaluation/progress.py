"""What is said of a finished scheme where no progress bar can be drawn."""

from __future__ import annotations

import sys

from fxquant.evaluation.results import Row
from fxquant.run.distributed import is_main


def say_finished(name: str, row: Row) -> None:
    """One line on stderr where that is no terminal, from the process that prints."""
    if is_main() and not sys.stderr.isatty():
        seconds = row.convert_seconds + row.evaluate_seconds
        print(f"{name}: loss {row.loss:.4f}, {seconds:.1f} s", file=sys.stderr, flush=True)
