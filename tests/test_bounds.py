"""Nothing that a test does waits for ever, whatever the machine does meanwhile."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import finished, started

FOLDER = Path(__file__).parent
OWN = ("processes.py", "test_bounds.py", "test_environments.py")  # make, which only prints
WAITS = ("acquire", "communicate", "get", "join", "result", "wait")


def waits_for_ever(path: Path) -> Iterator[str]:
    """Calls that wait without an end, and modules whose processes would."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in WAITS and not node.args and not node.keywords:
                yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Import) and path.name not in OWN:
            names = {alias.name for alias in node.names}
            yield from (f"{path.name} imports {name}" for name in names & {"subprocess"})


def test_no_test_waits_without_a_bound() -> None:
    found = [each for path in sorted(FOLDER.rglob("*.py")) for each in waits_for_ever(path)]
    assert found == []


def test_what_waits_is_found(tmp_path: Path) -> None:
    file = tmp_path / "test_x.py"
    file.write_text("import subprocess\nthread.join()\n','.join(names)\nrun.wait(3)\n")
    assert list(waits_for_ever(file)) == [
        "test_x.py imports subprocess",
        "test_x.py:2: thread.join()",
    ]


def test_a_command_is_over_with_what_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.processes.BOUND", 3.0)
    sleeping = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; "
    sleeping += "print(1, flush=True); time.sleep(600)'])"
    with pytest.raises(subprocess.TimeoutExpired):
        finished([sys.executable, "-c", sleeping])
    with started([sys.executable, "-c", sleeping]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
    assert process.stdout.read() == ""  # the grandchild, which held the pipe, has ended


def test_no_name_of_another_host_is_known() -> None:
    with pytest.raises(socket.gaierror, match="no network"):
        socket.create_connection(("huggingface.co", 443), timeout=5)
    assert socket.getaddrinfo("localhost", 80)


STUCK = """
import signal
import time
def test_stuck():
    signal.pthread_sigmask(signal.SIG_BLOCK, {})
    time.sleep(600)
"""
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.conftest")


@pytest.mark.parametrize("reached", [True, False], ids=["by a signal", "by none"])
def test_a_test_that_is_stuck_ends_and_says_where(reached: bool, tmp_path: Path) -> None:
    (tmp_path / "test_stuck.py").write_text(STUCK.format([] if reached else "[signal.SIGALRM]"))
    options = ["-c", str(FOLDER.parent / "pyproject.toml"), "-o", "timeout=2", str(tmp_path)]
    done = finished([*PYTEST, *options])
    assert done.returncode == 1
    if reached:
        assert "Failed: Timeout (>2.0s)" in done.stdout
        assert "time.sleep(600)" in done.stdout
    else:
        assert re.search(
            r"Timeout \(.*\)!\n.*test_stuck.py\", line 6 in test_stuck", done.stderr, re.S
        )
