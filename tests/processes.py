"""Commands that tests run beside themselves: they ask nobody, and none may wait for ever."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent
BOUND = 300.0  # seconds; an idle core takes none of them a tenth of it
FXQUANT = (sys.executable, "-m", "fxquant.cli")

Command = Sequence[str | Path]


def _interruptible() -> None:
    """What a shell starts in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def started(
    command: Command, *, stdin: int = subprocess.DEVNULL, stdout: IO[str] | int = subprocess.PIPE,
    interruptible: bool = False, environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:  # fmt: skip
    """``command`` in this checkout; it is over when the block is, with all that it has started."""
    process = subprocess.Popen(
        command,
        stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        preexec_fn=_interruptible if interruptible else None, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(BOUND)


def finished(
    command: Command,
    given: str | None = None,
    *,
    stdout: IO[str] | int = subprocess.PIPE,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """``command`` run to its end, with ``given`` on its standard input.

    Raises TimeoutExpired after BOUND seconds, when it and all that it has started are ended.
    """
    stdin = subprocess.DEVNULL if given is None else subprocess.PIPE
    with started(command, stdin=stdin, stdout=stdout, environment=environment) as process:
        out, err = process.communicate(given, timeout=BOUND)
    return subprocess.CompletedProcess(command, process.returncode, out, err)
