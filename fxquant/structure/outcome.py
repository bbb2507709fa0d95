"""What a repair did at one place: it changed it, or something was in the way."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node


@dataclass(frozen=True)
class Changed:
    """The place is other than before; ``note`` is what there is to say about it, if anything."""

    note: str = ""


@dataclass(frozen=True)
class Blocked:
    """The place stays as it was: why, and the nodes that are in the way, if any are."""

    reason: str
    nodes: tuple[Node, ...] = ()


# The path of a site or of another part of the model, and what was done there.
Outcome = tuple[str, Changed | Blocked]
