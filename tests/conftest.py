"""Tests run on one thread: the models are tiny, and two test runs at once must not fight.

Goldens: ``assert text == golden`` compares with ``tests/golden/<module>/<test>.txt``, which
``pytest --update-golden`` writes.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what the goldens expect")


@dataclass(eq=False)
class Golden:
    """Equal to the text of its file; trailing white space at the end does not count."""

    path: Path
    update: bool

    def text(self) -> str:
        return self.path.read_text(encoding="utf-8") if self.path.exists() else ""

    def __eq__(self, found: object) -> bool:
        if not isinstance(found, str):
            return NotImplemented
        if self.update:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(found.rstrip() + "\n", encoding="utf-8")
        return self.path.exists() and found.rstrip() == self.text().rstrip()

    __hash__ = None  # type: ignore[assignment]


def check_goldens(module: pytest.Module) -> None:
    """AssertionError where a golden of the module belongs to no test that it has."""
    items = list(module.session.genitems(module))
    wanted = {_golden_path(i) for i in items if "golden" in getattr(i, "fixturenames", ())}
    stale = set((GOLDEN / module.path.stem).iterdir()) - wanted
    assert not stale, f"no test reads {', '.join(sorted(path.name for path in stale))}: delete"


def _golden_path(item: pytest.Item) -> Path:
    name = re.sub(r"[^\w.-]+", "-", item.name).strip("-")
    return GOLDEN / item.path.stem / f"{name}.txt"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden of this test and its parameters."""
    return Golden(_golden_path(request.node), request.config.getoption("--update-golden"))


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    if op != "==" or not isinstance(left, str) or not isinstance(right, Golden):
        return None
    lines = difflib.unified_diff(
        right.text().splitlines(), left.splitlines(), str(right.path), "found", lineterm=""
    )
    return ["the text differs from its golden (--update-golden writes it)", *lines]
