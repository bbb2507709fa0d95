"""Perplexity of a graph on windows, and what its quantizers clip meanwhile."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from tqdm import tqdm

from fxquant.errors import NonFiniteError
from fxquant.evaluation.statistics import WindowSums
from fxquant.execution import Executor
from fxquant.graph import arguments, device_of, is_op, source_of, tag
from fxquant.levels import OPS
from fxquant.loss import window_losses
from fxquant.quantization import quantize_affine


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
        return math.exp(self.loss) if self.loss < 700 else math.inf


class ClippingCounter:
    """Sees a run's values and counts what its activation quantizers clip."""

    def __init__(self, gm: GraphModule) -> None:
        self.quantizers = [n for n in gm.graph.nodes if is_op(n, OPS.quantize.default)]
        self._operands = {arg for node in self.quantizers for arg in node.all_input_nodes}
        # Inputs are let go after their last quantizer; scales are small.
        last = {source_of(node): node for node in self.quantizers}
        self._last = {user: source for source, user in last.items()}
        self._values: dict[Node, Tensor] = {}
        self.clipped = 0.0
        self.total = 0

    def __call__(self, node: Node, value: Tensor) -> Tensor:
        if node in self._operands:
            self._values[node] = value
        if node in self.quantizers:
            args: list[Any] = [self._values.get(a, a) for a in arguments(node)]
            if not bool(torch.isfinite(args[0]).all()):
                raise NonFiniteError(
                    f"{tag(node).site}: its input holds NaN or infinite activations, which have no "
                    "code; the model overflows its dtype here"
                )
            codes, clipping = quantize_affine(*args)
            self.clipped += float(clipping.low + clipping.high) * codes.numel()
            self.total += codes.numel()
            if node in self._last:
                self._values.pop(self._last[node], None)
        return value

    @property
    def share(self) -> float | None:
        return self.clipped / self.total if self.total else None


def evaluate(
    gm: GraphModule,
    windows: Tensor,
    *,
    batch_size: int = 1,
    label: str = "evaluate",
    scored: Tensor | None = None,
) -> Perplexity:
    """Loss of every token of windows int64 [N, L] (but each window's first), with a progress bar.

    ``scored`` int64 [N]: where windows overlap, how many of each one's last tokens count (None:
    all L - 1); the others are context only. Every scored token weighs the same.

    Raises NonFiniteError naming the first site or node that computes NaN or infinity.
    """
    counter, executor, device = ClippingCounter(gm), Executor(gm), device_of(gm)

    def forward(ids: Tensor) -> Tensor:
        logits = executor.run(counter if counter.quantizers else None, input_ids=ids)
        assert isinstance(logits, Tensor)
        return logits

    started = time.perf_counter()
    steps = window_losses(forward, windows.to(device), batch_size)
    total = -(-len(windows) // batch_size)
    losses = torch.cat(list(tqdm(steps, label, total, unit="batch", leave=False, disable=None)))
    seconds = time.perf_counter() - started
    if not bool(torch.isfinite(losses).all()):
        bad = int((~torch.isfinite(losses)).any(1).nonzero()[0])
        raise NonFiniteError(
            f"{first_non_finite(gm, windows[bad : bad + 1].to(device))}: NaN or infinite "
            f"activations in window {bad}; the model overflows its dtype here"
        )
    return Perplexity(losses, counter.share, seconds, scored)


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
