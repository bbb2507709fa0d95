"""The command line of ``fxquant report``."""

from __future__ import annotations

import argparse

from fxquant.cli.arguments import place
from fxquant.evaluation.report.page import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=place, metavar="RESULTS_DIR", help="what --output named")
    parser.add_argument(
        "--output", type=place, metavar="FILE", help="the HTML file (RESULTS_DIR/report.html)"
    )


def report_command(options: argparse.Namespace) -> int:
    """Write the page; say where it is and what the folder did not hold."""
    output = options.output or options.results / "report.html"
    report = write_report(options.results, output)
    print(f"written to {output} ({output.stat().st_size / 1024:.0f} kB), from", end=" ")
    print(", ".join(source.name for source in report.sources))
    for part in report.missing:
        print(f"not in this folder: {part.what}; run {part.command}")
    return 0
