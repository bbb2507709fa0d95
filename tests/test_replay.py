"""Equal windows as one captured graph: the same bits, or run as they are with a note.

Without a CUDA device a graph of ATen operators stands for the captured one: it is recorded once,
reads and writes the same tensors each time, runs no Python of ours, and cannot be asked for a
number while it is recorded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fxquant
from fxquant.errors import NonFiniteError
from fxquant.evaluation import perplexity
from fxquant.evaluation.perplexity import Perplexity, evaluate
from fxquant.run import replay
from fxquant.run.replay import PAYS, Replayed, why_not
from tests.architectures import llama, opt, token_ids

Outputs = tuple[Tensor, ...]


class Recorded:
    """A Recorder of ATen operators. ``replays``: how often it ran."""

    def __init__(self) -> None:
        self.records = self.replays = 0

    def record(self, step: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        self.records += 1
        found = make_fx(lambda: step())()
        outputs = tuple(torch.empty_like(each) for each in step())

        def again() -> None:
            self.replays += 1
            for output, value in zip(outputs, found(), strict=True):
                output.copy_(value)

        return again, outputs


class Refused:
    def __init__(self, error: RuntimeError) -> None:
        self.error = error

    def record(self, step: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        raise self.error


class Empty:
    """As a capture on another stream: the step ran, and nothing is replayed."""

    def record(self, step: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        outputs = step()
        return (lambda: None), outputs


class Wrong(Recorded):
    """Its first element is not what the step computes."""

    def record(self, step: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        again, outputs = super().record(step)

        def other() -> None:
            again()
            outputs[0].view(-1)[0] += 1e-6

        return other, outputs


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    made = Recorded()
    installed(monkeypatch, made)
    return made


def installed(monkeypatch: pytest.MonkeyPatch, recorder: Any) -> Any:
    """Evaluation on the CPU replays by ``recorder``, as it would on CUDA."""
    monkeypatch.setattr(perplexity, "why_not", lambda gm: "")
    monkeypatch.setattr(perplexity, "CudaRecorder", lambda: recorder)
    return recorder


def equal(one: Perplexity, other: Perplexity) -> bool:
    return torch.equal(one.losses, other.losses) and one.share_clipped == other.share_clipped


SCHEMES = ("fp", "w4-g12", "w8a8-dynamic-token", "w8a8-dynamic", "w4-g12/a8-dynamic-token", "fp8")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_windows_are_replayed_to_the_same_bits(scheme: str, recorder: Recorded) -> None:
    graph = fxquant.convert(llama(num_hidden_layers=1), scheme)
    ids = token_ids(PAYS + 4, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = evaluate(graph, ids)
    # The first as it is and, to be compared, by the captured graph, which then does the rest.
    assert (recorder.records, recorder.replays) == (1, PAYS + 4)
    assert len(found.losses.unique()) > 8 * (PAYS + 3), "each window has losses of its own"
    assert equal(found, evaluate(graph, ids, replay=False))
    assert recorder.records == 1


def test_only_where_enough_equal_batches_are_to_come(recorder: Recorded) -> None:
    graph = fxquant.convert(opt(num_hidden_layers=1), "w8a8-dynamic-token")
    few, odd = token_ids(PAYS, 9), token_ids(2 * PAYS + 3, 9)
    assert equal(evaluate(graph, few), evaluate(graph, few, replay=False))
    assert recorder.records == 0
    # The last batch holds one window, the others two.
    found = evaluate(graph, odd, batch_size=2)
    assert (recorder.records, recorder.replays) == (1, PAYS + 1)
    assert equal(found, evaluate(graph, odd, batch_size=2, replay=False))


@pytest.mark.parametrize(
    ("recorder", "why"),
    [
        (
            Refused(RuntimeError("operation not permitted when stream is capturing")),
            "not permitted",
        ),
        (Refused(torch.OutOfMemoryError("CUDA out of memory. Tried 2.00 GiB")), "out of memory"),
        (Empty(), "it gave other bits"),
        (Wrong(), "it gave other bits"),
    ],
)
def test_waits_short_memory_and_other_bits_change_nothing(
    recorder: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = fxquant.convert(llama(num_hidden_layers=1), "w8a8-dynamic-token")
    ids = token_ids(PAYS + 3, 9)
    installed(monkeypatch, recorder)
    with pytest.warns(RuntimeWarning, match=f"run one by one.*{why}.* the same") as noted:
        found = evaluate(graph, ids)
    assert len(noted) == 1, "said once"
    assert equal(found, evaluate(graph, ids, replay=False))


def test_a_window_that_overflows_is_named_when_it_is_replayed(recorder: Recorded) -> None:
    graph = fxquant.convert(llama(num_hidden_layers=1), "w8a8-dynamic-token")
    table = graph.get_parameter("model.embed_tokens.weight")
    with torch.no_grad():
        table[7] = torch.nan
    ids = token_ids(PAYS + 3, 9)
    ids[ids == 7] = 8
    evaluate(graph, ids)
    ids[-1, 3] = 7
    with pytest.raises(NonFiniteError, match="q_proj: its input holds NaN"):
        evaluate(graph, ids)
    assert recorder.records == 2


def test_results_are_the_callers_own() -> None:
    steps = Replayed(lambda ids: (ids * 2,), [torch.zeros(3, dtype=torch.int64)] * 9, Recorded())
    found = [steps(torch.full((3,), n, dtype=torch.int64))[0] for n in range(9)]
    assert [int(each[0]) for each in found] == [2 * n for n in range(9)]


def test_where_no_graph_is_captured(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fxquant.convert(llama(num_hidden_layers=1), "w8")
    assert why_not(graph) == "the graph is on cpu"
    fxquant.save(graph, tmp_path / "saved")
    streamed = fxquant.load(tmp_path / "saved", stream=True)
    monkeypatch.setattr(replay, "device_of", lambda _: torch.device("cuda"))
    assert why_not(streamed) == "its weights are read from files while it runs"
    assert why_not(graph) == ""
