"""Processes that are forked while a trace is under way: neither side waits for ever."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.frontends import patching
from tests.architectures import opt
from tests.test_threads import IDS, MASK, differing, process, stopping


def ends_well(work: Callable[[], object]) -> bool:
    """Whether ``work`` comes to its end in a forked process."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    child.kill()
    child.join(60)
    return child.exitcode == 0


def traces_as_before(expected: Tensor, before: dict[str, Any]) -> None:
    """In a thread of its own, which has none of the caller's modes."""

    def look() -> None:
        assert not differing(before, process())
        assert torch.equal(fxquant.trace(opt(seed=2))(IDS, MASK), expected)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(look).result(60)


@pytest.fixture(scope="module")
def check() -> Callable[[], None]:
    return partial(traces_as_before, fxquant.trace(opt(seed=2))(IDS, MASK), process())


def test_a_model_that_forks_while_it_is_recorded(check: Callable[[], None]) -> None:
    ended: list[bool] = []
    model = stopping(lambda: ended.append(ends_well(check)))
    graph = fxquant.trace(model, frontend="recorder")
    assert ended
    assert all(ended)
    assert bool(graph(IDS, MASK).isfinite().all())
    check()


@pytest.mark.parametrize("over", [True, False], ids=["that ends", "that does not end"])
def test_a_fork_beside_a_trace(
    over: bool, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patching, "FORK_WAITS", 60.0 if over else 0.2)
    halfway, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        halfway.set()
        assert go_on.wait(60)

    thread = threading.Thread(target=fxquant.trace, args=(stopping(wait),), daemon=True)
    thread.start()
    assert halfway.wait(60)
    if over:
        threading.Timer(0.5, go_on.set).start()
    assert ends_well(check)
    assert go_on.is_set() is over
    go_on.set()
    thread.join(60)
    assert not thread.is_alive()
    check()
