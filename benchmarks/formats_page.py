"""docs/formats_measured.md as text."""

from __future__ import annotations

from typing import Any


def page(data: dict[str, Any]) -> str:
    """The whole page."""
    raise NotImplementedError
