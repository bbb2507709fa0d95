"""SIGTERM as an interruption: what says what is kept on Ctrl-C says it then too."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


class Received:
    """Which signal has arrived."""

    def __init__(self) -> None:
        self.terminated = False

    def status(self, status: int) -> int:
        """The exit status: 143 where ``status`` says interrupted and SIGTERM was the reason."""
        return TERMINATED if self.terminated and status == INTERRUPTED else status


def signal_name(stop: KeyboardInterrupt) -> str:
    return "SIGTERM" if isinstance(stop, Terminated) else "SIGINT"


@contextlib.contextmanager
def terminable() -> Iterator[Received]:
    """Within the block SIGTERM raises Terminated; outside the main thread nothing changes."""
    received = Received()

    def stop(_: int, __: FrameType | None) -> None:
        received.terminated = True
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
