"""Work that is ended without warning."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable

import pytest

from fxquant.analysis.meter import Cost
from fxquant.analysis.store import Store


def killed(work: Callable[[], object], after: float) -> bool:
    """Run ``work`` in a forked process and SIGKILL it; whether it was still running."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(after)
    process.kill()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def interrupt_store(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Names of the losses that stores keep from now on; KeyboardInterrupt behind the ``after``-th,
    and only there."""
    puts, names = Store.put, list[str]()

    def put(self: Store, name: str, value: float, cost: Cost) -> None:
        puts(self, name, value, cost)
        names.append(name)
        if len(names) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "put", put)
    return names
