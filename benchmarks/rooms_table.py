"""The table of rooms in docs/README.md, from the packages' own docstrings.

python -m benchmarks.rooms_table
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "README.md"
# From the ground up: a room may import those above it in this list.
ROOMS = (
    *("files", "formats", "schemes", "numerics", "numerics/solvers", "numerics/kernels"),
    *("ir", "run"),
    *(
        "structure",
        "pipeline",
        "frontends",
        "frontends/recorder",
        "../passes",
        "recipes",
        "analysis/inspection",
        "analysis",
        "checkpoint",
        "exports",
    ),
    *("../evaluation", "../evaluation/report", "cli"),
)
_BLOCK = re.compile(r"(<!-- rooms -->\n).*?(<!-- /rooms -->\n)", re.DOTALL)


def purpose(room: str) -> str:
    """The first sentence, or what stands before the first empty line, of the room's docstring."""
    file = (ROOT / "fxquant" / room / "__init__.py").resolve()
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert text is not None, f"{file} has no docstring"
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`")


def table() -> str:
    rows = []
    for room in ROOMS:
        shown = room.removeprefix("../") if room.startswith("..") else f"fxquant/{room}"
        rows.append((f"[`{shown}/`](../{shown}/__init__.py)", purpose(room)))
    return tabulate(rows, headers=("room", "what lives there"), tablefmt="github")


def rendered(page: str) -> str:
    """``page`` with its table of rooms made anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{table()}\n\n{found[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
