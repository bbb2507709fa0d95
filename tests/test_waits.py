"""Numbers that are read from tensors, each of which waits for the device."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fxquant
from fxquant.errors import ModelError
from fxquant.evaluation.perplexity import _shared_out, evaluate
from fxquant.run.loss import token_nll
from tests.architectures import VOCABULARY, llama, token_ids
from tests.test_cuda_fake import NoGuards, fake_cuda

READ = torch.ops.aten._local_scalar_dense.default


class Reads(TorchDispatchMode):
    """Counts the numbers that Python reads from tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func is READ
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme", ["fp", "w8a8-dynamic-token"])
def test_reads_of_an_evaluation_do_not_grow_with_its_windows(scheme: str) -> None:
    graph = fxquant.convert(llama(), scheme)
    counts = []
    for windows in (2, 7):
        reads = Reads()
        with reads:
            evaluate(graph, token_ids(windows, 9))
        counts.append(reads.count)
    assert counts[0] > 0
    assert counts[0] == counts[1]


def test_an_id_beyond_the_logits_is_an_error_whoever_looked() -> None:
    logits, ids = torch.randn(1, 5, VOCABULARY), token_ids(1, 5)
    assert token_nll(logits, ids).equal(token_nll(logits, ids, VOCABULARY - 1))
    for highest in (None, VOCABULARY):
        with pytest.raises(ModelError, match=f"of over {VOCABULARY}"):
            token_nll(logits, ids.fill_(VOCABULARY), highest)


# What Python asks of a tensor's numbers, and what it is told where there are none.
ASKED: dict[Any, Any] = {
    Tensor.item: 1,
    Tensor.__bool__: True,
    Tensor.__int__: 1,
    Tensor.__index__: 1,
    Tensor.__float__: 1.0,
}


class Waits(TorchFunctionMode):
    """Counts what waits for a CUDA device, on tensors that have no numbers: these are answered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def listed(self, tensor: Tensor) -> Any:
        """In place of FakeTensor's own tolist, which asks for one number after the other."""
        if tensor.is_cuda:
            self.calls.append("tolist")
        sizes = list(tensor.shape)
        found: Any = 1
        while sizes:
            found = [found] * sizes.pop()
        return found

    def __enter__(self) -> Waits:
        self._patch = mock.patch.object(FakeTensor, "tolist", lambda x: self.listed(x))
        self._patch.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        self._patch.stop()
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        there = bool(args) and isinstance(args[0], Tensor) and args[0].is_cuda
        if func in ASKED:
            if there:
                self.calls.append(func.__name__)
            return ASKED[func]
        found = func(*args, **(kwargs or {}))
        if there and isinstance(found, Tensor) and not found.is_cuda:
            self.calls.append(func.__name__)
        return found


def waits(scheme: str, level: str, layers: int, windows: int) -> list[str]:
    graph = fxquant.convert(
        llama(num_hidden_layers=layers), scheme, calibration=[token_ids(2, 9)], level=level
    )
    mode, seen = FakeTensorMode(), Waits()
    fake = fake_cuda(graph, mode)
    with mode, NoGuards(), seen:
        batches = list(torch.ones(windows, 1, 9, dtype=torch.int64, device="cuda"))
        _shared_out(fake, batches, 5, "", False)
    return seen.calls


EVERY_KIND = (
    *("fp", "w8", "w8a8-static", "w8a8-dynamic", "w8a8-dynamic-token-asym", "fp8", "fp8-static"),
)


QUICK = (
    ("w8a8-static", "kernels"),
    ("w8a8-dynamic-token-asym", "integer"),
    ("fp8-static", "integer"),
    ("fp", "kernels"),
)
SLOW = [
    pytest.param(scheme, level, marks=pytest.mark.slow)
    for scheme in EVERY_KIND
    for level in ("integer", "kernels")
    if (scheme, level) not in QUICK
]


@pytest.mark.parametrize(("scheme", "level"), [*QUICK, *SLOW])
def test_a_window_waits_once_for_the_device_however_many_sites(scheme: str, level: str) -> None:
    """On fake CUDA tensors, where a wait that is not answered here would be an error."""
    one, more, deeper = (waits(scheme, level, n, w) for n, w in ((1, 2), (1, 5), (2, 5)))
    assert more == deeper
    assert len(more) - len(one) == (0 if scheme in ("fp", "w8") else 3)


def test_what_waits_is_seen() -> None:
    """Each kind of wait is counted."""
    with FakeTensorMode(), NoGuards(), Waits() as seen:
        x = torch.ones(2, device="cuda")
        bool(x[0] > 0), int(x[0]), float(x[0]), x.cpu(), x.tolist(), x.to("cpu"), x[0].item()
    assert len(seen.calls) == 7
