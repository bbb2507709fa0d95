"""Perplexity of a graph on windows, and what its quantizers clip meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from tqdm import tqdm

from fxquant.errors import NonFiniteError
from fxquant.evaluation.clipping_counter import ClippingCounter, Quantizers
from fxquant.evaluation.statistics import WindowSums
from fxquant.ir.graph import device_of, tag
from fxquant.run.batched import is_streamed, run_batches
from fxquant.run.distributed import complete, is_main, shard
from fxquant.run.execution import Cut, Executor
from fxquant.run.head import final_head, nll_to_the_end
from fxquant.run.loss import highest_id, token_nll
from fxquant.run.replay import CudaRecorder, Replayed, why_not

T = TypeVar("T")


def from_loss(loss: float) -> float:
    """exp(loss); infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class Perplexity:
    """Losses of one graph on windows.

    ``losses``: nats of each predicted token, float32 [N, L - 1]; ``share_clipped``: fraction of
    quantized activation elements whose code was clipped, None if none are quantized; ``scored``
    int64 [N]: how many of each window's last tokens count, None for all.
    """

    losses: Tensor
    share_clipped: float | None
    seconds: float
    scored: Tensor | None = None

    @property
    def sums(self) -> WindowSums:
        """Each window's scored nats, summed in float64 and in the windows' order."""
        length = self.losses.shape[1]
        counts = [length] * len(self.losses) if self.scored is None else self.scored.tolist()
        rows = self.losses.to(torch.float64)
        sums = (float(row[length - n :].sum()) for row, n in zip(rows, counts, strict=True))
        return WindowSums(tuple(sums), tuple(counts))

    @property
    def loss(self) -> float:
        return self.sums.loss

    @property
    def perplexity(self) -> float:
        return from_loss(self.loss)


def _shared_out(
    gm: GraphModule, batches: Sequence[Tensor], highest: int, label: str, replay: bool
) -> tuple[Tensor, float | None]:
    """Losses [N, L - 1] of all batches, whose ids go up to ``highest``, and the share clipped,
    whichever process computes them."""
    mine = shard(batches)
    steps = _one_late(_batch_results(gm, [ids for _, ids in mine], highest, label, replay))
    quiet = None if is_main() else True
    bar = tqdm(steps, label, len(mine), unit="batch", leave=False, disable=quiet)
    losses = [
        batch.new_zeros((len(batch), batch.shape[1] - 1), dtype=torch.float32) for batch in batches
    ]
    counts = torch.zeros((len(batches), 2), dtype=torch.float64)
    for (index, _), (found, clipping) in zip(mine, bar, strict=True):
        losses[index] = found
        counts[index] = torch.tensor(clipping(), dtype=torch.float64)
    # Summed one after the other, so that the number of processes changes nothing.
    clipped, total = (sum(column) for column in complete(counts.to(batches[0].device)).t().tolist())
    return complete(torch.cat(losses)).cpu(), clipped / total if total else None


def _one_late(steps: Iterator[T]) -> Iterator[T]:
    """Each step when the next has begun: what is read of it leaves no device without work."""
    before: list[T] = []
    for step in steps:
        yield from before
        before = [step]
    yield from before


@torch.no_grad()
def _batch_results(
    gm: GraphModule, batches: Sequence[Tensor], highest: int, label: str, replay: bool
) -> Iterator[tuple[Tensor, Callable[[], tuple[int, int]]]]:
    """Each batch's losses, and what reads how many activation elements were clipped and how many
    quantized."""
    quantizers = Quantizers.of(gm)
    seen: dict[torch.Size, tuple[int, list[int]]] = {}

    def finished(ids: Tensor, counter: ClippingCounter, nll: Tensor) -> tuple[Tensor, Tensor]:
        seen[ids.shape] = counter.total, counter.sizes
        return nll, counter.on_device(ids)

    def step(ids: Tensor) -> tuple[Tensor, ...]:
        counter = ClippingCounter(quantizers)
        watcher = counter if quantizers.calls else None
        return finished(ids, counter, rest(executor, executor.start(input_ids=ids), ids, watcher))

    found: Iterable[tuple[Tensor, ...]]
    rest = _loss_behind(gm, highest)
    if is_streamed(gm):
        counters = [ClippingCounter(quantizers) for _ in batches]
        watchers = [counter if quantizers.calls else None for counter in counters]
        inputs = [{"input_ids": ids} for ids in batches]
        losses = run_batches(
            *(gm, inputs, watchers),
            label=label if is_main() else "",
            finish=lambda run, cut, index: rest(run, cut, batches[index], watchers[index]),
        )
        found = map(finished, batches, counters, losses)
    else:
        executor = Executor(gm)
        captured = replay and not why_not(gm)
        found = map(Replayed(step, batches, CudaRecorder()) if captured else step, batches)
    for ids, (nll, counts) in zip(batches, found, strict=True):
        total, sizes = seen[ids.shape]
        yield nll, partial(_read, quantizers, counts, sizes, total)


def _read(quantizers: Quantizers, counts: Tensor, sizes: list[int], total: int) -> tuple[int, int]:
    return quantizers.read(counts, sizes), total


def _loss_behind(
    gm: GraphModule, highest: int
) -> Callable[[Executor, Cut, Tensor, ClippingCounter | None], Tensor]:
    """What runs a graph on from a cut, with its batch's ids and watcher, to token_nll; on the CPU
    without a tensor of all logits, where the graph ends in its head."""
    head = final_head(gm)
    if head is not None and device_of(gm).type == "cpu":
        return lambda executor, cut, ids, watcher: nll_to_the_end(
            *(executor, cut, head, ids), on_node=watcher, highest=highest
        )

    def whole(executor: Executor, cut: Cut, ids: Tensor, watcher: ClippingCounter | None) -> Tensor:
        end = executor.advance(cut, on_node=watcher)
        return token_nll(end.values[executor.nodes[-1]], ids, highest)

    return whole


def evaluate(
    gm: GraphModule,
    windows: Tensor,
    *,
    batch_size: int = 1,
    label: str = "evaluate",
    scored: Tensor | None = None,
    replay: bool = True,
) -> Perplexity:
    """Loss of every token of windows int64 [N, L] (but each window's first), with a progress bar.

    ``scored`` int64 [N]: where windows overlap, how many of each one's last tokens count (None:
    all L - 1); the others are context only. Every scored token weighs the same. ``replay``: equal
    batches as one captured CUDA graph, where there can be one: the same bits.

    Raises NonFiniteError naming the first site or node that computes NaN or infinity.
    """
    device = device_of(gm)
    started = time.perf_counter()
    batches = windows.to(device).split(batch_size)
    losses, share = _shared_out(gm, batches, highest_id(windows), label, replay)
    seconds = time.perf_counter() - started
    if not bool(torch.isfinite(losses).all()):
        bad = int((~torch.isfinite(losses)).any(1).nonzero()[0])
        raise NonFiniteError(
            f"{first_non_finite(gm, windows[bad : bad + 1].to(device))}: NaN or infinite "
            f"activations in window {bad}; the model overflows its dtype here"
        )
    return Perplexity(losses, share, seconds, scored)


@torch.no_grad()
def first_non_finite(gm: GraphModule, ids: Tensor) -> str:
    """The site, or else the node, that first computes NaN or infinity on ``ids``."""
    found: list[str] = []

    def on_node(node: Node, value: object) -> object:
        # Masks hold -inf on purpose; what counts is what layers and sites compute.
        computed = node.op == "call_module" or tag(node).is_output
        if computed and isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            found.append(tag(node).site or str(node.target))
        return value

    Executor(gm).run(on_node, input_ids=ids)
    return found[0] if found else "the loss"
