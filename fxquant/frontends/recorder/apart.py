"""A step in a thread of its own, so that nothing is left of it wherever it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from fxquant.frontends.patching import lent

T = TypeVar("T")


def apart(step: Callable[[threading.Event], T]) -> T:
    """What ``step(stop)`` returns or raises.

    torch keeps modes, dispatch keys and default dtypes of each thread; what of them an interruption
    leaves behind is gone with the thread, and the caller's are not seen by it. Ctrl-C meets the
    caller, waits for ``step`` and goes on: a step looks at ``stop`` now and then.
    """
    stop = threading.Event()
    values: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with lent():
                values.append(step(stop))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="fxquant-recorder", daemon=True)
    try:
        thread.start()
        thread.join()
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join()
    if errors:
        raise errors[0]
    return values[0]
