"""Work that is ended without warning."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable


def killed(work: Callable[[], object], after: float) -> bool:
    """Run ``work`` in a forked process and SIGKILL it; whether it was still running."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0
