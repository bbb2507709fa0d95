"""Write the tables of README and docs from committed results:

    python -m benchmarks.readme_tables [--check]

A page marks where a table stands and which results it is made from, a path from the repository's
root; everything between the two marks is replaced:

    <!-- table: docs/results/demo/results.json -->
    <!-- /table -->

results.json (of ``fxquant evaluate``) gives table, provenance and sentences; results.jsonl (of a
sweep) gives its tables beside the published figures.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from fxquant.evaluation.comparison import format_results
from fxquant.evaluation.journal import read_journal
from fxquant.evaluation.results import read_results
from fxquant.evaluation.tables import format_table, sentences

ROOT = Path(__file__).parent.parent
_MARKED = re.compile(r"(<!-- table: (?P<path>\S+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


def pages() -> list[Path]:
    """Where marks may stand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def table_of(path: Path) -> str:
    """The Markdown that stands for a file of results. Raises DataError if it is none."""
    if path.suffix == ".jsonl":
        return format_results(read_journal(path))
    rows, made = read_results(path)
    said = "\n".join(f"> {sentence}" for sentence in sentences(rows))
    parts = (format_table(rows), made.line(), f"`{made.command}`", said)
    return "\n\n".join(part for part in parts if part)


def with_tables(text: str, root: Path = ROOT) -> str:
    """A page's text with every marked table made anew from the results under ``root``."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{table_of(root / match['path'])}\n\n{match[4]}"

    return _MARKED.sub(replace, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a page is stale")
    check = parser.parse_args().check
    stale = [page for page in pages() if with_tables(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{page.name}: {'stale' if check else 'written'}")
        if not check:
            page.write_text(with_tables(page.read_text()))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
