"""Context: what passes work on beside the graph, the same for all passes of one run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fxquant.run.batches import Batches
from fxquant.schemes.scheme import Scheme


@dataclass(frozen=True)
class Context:
    """What every pass of a run is given; its own fields are its options and nothing else.

    Attributes:
        scheme: which sites become codes, and of what kind.
        batches: calibration data, readable as often as the passes say; None if there is none.
        progress: progress bars, on a terminal.
        cache: a folder in which long repairs keep finished blocks; None keeps nothing.
    """

    scheme: Scheme = field(default_factory=Scheme)
    batches: Batches | None = None
    progress: bool = False
    cache: Path | None = None


# For passes that ask for nothing beside the graph.
BARE = Context()
