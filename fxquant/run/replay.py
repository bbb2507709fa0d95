"""Equal steps, captured as one CUDA graph and replayed: one launch for all of a step's kernels."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.files.doors import reason
from fxquant.ir.graph import device_of
from fxquant.run.batched import is_streamed

Step = Callable[[Tensor], tuple[Tensor, ...]]
PAYS: Final = 4  # further batches of a shape; to capture one takes about as long as to run two


class Recorder(Protocol):
    """What captures: ``record`` runs ``step`` without computing anything, if it can, and gives what
    computes all of it anew, and the tensors that it then writes."""

    def record(
        self, step: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Callable[[], object], tuple[Tensor, ...]]: ...


class CudaRecorder:
    """Of the current CUDA device."""

    def record(
        self, step: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Callable[[], object], tuple[Tensor, ...]]:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                outputs = step()
        finally:
            torch.cuda.set_stream(before)  # where a capture's end fails, torch leaves its own
        return graph.replay, outputs


def why_not(gm: GraphModule) -> str:
    """Why steps of the graph cannot be captured, as far as it can be told; "" if they may be."""
    device = device_of(gm)
    if device.type != "cuda":
        return f"the graph is on {device}"
    if is_streamed(gm):
        return "its weights are read from files while it runs"
    return ""


class Replayed:
    """``step`` of int64 [b, L], in the same bits: replayed where equal ``batches`` are to come.

    The first batch of a shape is run as it is, and its results are what a captured graph is held
    against before another batch is its. What waits for the device, takes too much memory or gives
    other bits is said in a warning, and all batches are run as they are then. The results are the
    caller's own tensors. The caller chooses the grad mode.
    """

    def __init__(self, step: Step, batches: Iterable[Tensor], recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._left = Counter(batch.shape for batch in batches)
        self._shape: torch.Size | None = None
        self._outputs: tuple[Tensor, ...] = ()
        self._refused = False

    def __call__(self, ids: Tensor) -> tuple[Tensor, ...]:
        self._left[ids.shape] -= 1
        if ids.shape == self._shape:
            return self._replayed(ids)
        found = self._step(ids)
        if not self._refused and self._left[ids.shape] >= PAYS:
            self._refused = not self._captures(ids, found)
        return found

    def _replayed(self, ids: Tensor) -> tuple[Tensor, ...]:
        self._input.copy_(ids)
        self._replay()
        return tuple(each.clone() for each in self._outputs)

    def _captures(self, ids: Tensor, found: tuple[Tensor, ...]) -> bool:
        """Whether a graph of batches like ``ids`` stands ready, in place of an earlier one."""
        self._shape, self._outputs = None, ()
        self._input = ids.clone()
        try:
            with torch.cuda.device_of(ids):
                self._replay, self._outputs = self._recorder.record(lambda: self._step(self._input))
            for each in self._outputs:
                each.fill_(-1)  # what a step left there that was not captured must not pass
            same = all(map(_same_bits, self._replayed(ids), found))
        except RuntimeError as error:  # it waits for the device, or memory is short
            return _refuse(reason(error))
        if not same:
            return _refuse("it gave other bits")
        self._shape = ids.shape
        return True


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Also where both are NaN."""
    whole = {4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.view(whole), other.view(whole))


def _refuse(why: str) -> bool:
    warnings.warn(
        f"windows are run one by one, not replayed as a captured CUDA graph: {why}; slower, and "
        "the figures are the same",
        RuntimeWarning,
        stacklevel=5,
    )
    return False
