"""Numbers that are read from tensors, each of which waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fxquant
from fxquant.errors import ModelError
from fxquant.evaluation.perplexity import evaluate
from fxquant.run.loss import token_nll
from tests.architectures import VOCABULARY, llama, token_ids

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
