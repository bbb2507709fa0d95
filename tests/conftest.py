"""Tests run on one thread: the models are tiny, and two test runs at once must not fight.

No test may depend on the machine: ``.ci/vary`` runs them as on others. ``--threads 2`` computes
on two; ``--clock frozen`` and ``--clock slow`` let no time pass, or 11
days between two looks at the clock. Random inputs follow from ``--seed`` and a test's name alone,
so that what failed elsewhere fails here too; ``--seed fresh`` takes inputs that no run had, and
says which. A test that needs a program which is not installed is skipped,
and fails where ``FXQUANT_REQUIRE_PROGRAMS`` is set: the mark ``needs_program(found, what)``.

None waits for ever, and none asks a network: ``timeout`` in pyproject.toml holds for each test, an
hour for a slow one, and one that no signal reaches takes its process along soon after; names of
other hosts than this one are unknown.

Goldens: ``assert text == golden`` compares with ``tests/golden/<module>/<test>.txt``, which
``pytest --update-golden`` writes.
"""

from __future__ import annotations

import difflib
import faulthandler
import gc
import itertools
import os
import random
import re
import socket
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from _pytest.faulthandler import fault_handler_stderr_fd_key

from tests.environments import LONGEST, NO_MODEL, TRANSFORMERS_5

collect_ignore = NO_MODEL if TRANSFORMERS_5 else ()

# Its deadline and its "too slow" measure the machine.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what the goldens expect")
    parser.addoption("--seed", default="0", help="of random inputs: a number, or fresh")
    parser.addoption("--threads", type=int, default=1, help="threads that torch computes on")
    parser.addoption("--clock", choices=CLOCKS, help="what time.perf_counter says")


CLOCKS: dict[str, Callable[[], float]] = {
    "frozen": lambda: 1000.0,
    "slow": itertools.count(0, 1e6).__next__,
}


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its seed
def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed == "fresh":
        config.option.seed = str(torch.seed() % 2**32)  # and so the processes of a run get it
    config.option.hypothesis_seed = config.option.seed
    torch.manual_seed(int(config.option.seed))
    torch.set_num_threads(config.getoption("--threads"))
    if hasattr(config.option, "loadscopereorder"):  # of xdist: files with the most tests first
        config.option.loadscopereorder = False
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_compiled_here()))
    # No pool of compilers: the tests themselves run on all cores.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    socket.getaddrinfo = partial(_known_here, socket.getaddrinfo)
    clock = config.getoption("--clock")
    if clock is not None:
        time.perf_counter = CLOCKS[clock]


def _known_here(look_up: Callable[..., Any], host: Any, *arguments: Any, **options: Any) -> Any:
    """getaddrinfo of a machine without a network, also where one would take its time."""
    name = host.decode() if isinstance(host, bytes) else host
    if name not in (None, "", "localhost", "::1", socket.gethostname()) and not re.match(
        r"127\.|0\.0\.0\.0$", str(name)
    ):
        raise socket.gaierror(socket.EAI_AGAIN, "tests have no network")
    return look_up(host, *arguments, **options)


def _compiled_here() -> Path:
    """Where torch.compile keeps what it made: one folder for each set of vector instructions.

    torch keeps its C++ by what it computes, not by the instructions that it is written for: code of
    a run with vectors does not compile in one without them.
    """
    chosen = os.environ.get("ATEN_CPU_CAPABILITY", "any")
    name = f"torchinductor_{os.getuid()}_{chosen}_{torch.backends.cpu.get_cpu_capability()}"
    return Path(tempfile.gettempdir()) / name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))


def pytest_collection_finish() -> None:
    """What all files import stays, and the collector of garbage walks through it no more."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries take for leaked what a process leaves at its end


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """What stands still outside of Python hears no signal: it says where, and its process ends.
    The other processes of a run go on, with a new one in its place."""
    mark = item.get_closest_marker("timeout")
    bound = float(mark.args[0] if mark else item.config.getini("timeout")) * 17 / 16
    faulthandler.dump_traceback_later(
        bound, exit=True, file=item.config.stash[fault_handler_stderr_fd_key]
    )
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(tryfirst=True)  # before fixtures of a module, which use the program
def pytest_runtest_setup(item: pytest.Item) -> None:
    _seed(item.config, item.path.name)  # for fixtures of a module
    for mark in item.iter_markers("needs_program"):
        found, what = mark.args
        if found:
            continue
        if os.environ.get("FXQUANT_REQUIRE_PROGRAMS"):
            pytest.fail(f"not installed, and FXQUANT_REQUIRE_PROGRAMS is set: {what}")
        pytest.skip(f"not installed: {what}")


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: --seed {config.option.seed}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.get("failed"):
        seed = terminalreporter.config.option.seed
        terminalreporter.write_line(f"the same random inputs again: --seed {seed}")


def _seed(config: pytest.Config, of: str) -> None:
    seed = int(config.option.seed) + zlib.crc32(of.encode())
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.fixture(autouse=True, scope="module")
def _recorded_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """See tests/recorded.py."""
    if "fxquant" not in sys.modules:  # and a test that knows no fxquant waits for no import of it
        yield
        return
    from tests.recorded import sharing

    with sharing(request.path.name):
        yield


@pytest.fixture(autouse=True)
def _random(request: pytest.FixtureRequest) -> None:
    _seed(request.config, request.node.nodeid)


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm and argparse lay out for the terminal at hand."""
    monkeypatch.setenv("COLUMNS", "120")


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
