"""The lab: one float graph, its quantized sites, windows, and losses under any mix of parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.analysis.meter import Meter
from fxquant.analysis.parts import EVERY_PART, Parts
from fxquant.analysis.sites import SimulatedSite
from fxquant.errors import NonFiniteError
from fxquant.ir.legal_forms import observer_nodes
from fxquant.run.execution import Cut, Executor
from fxquant.run.head import final_head, nll_to_the_end
from fxquant.run.loss import highest_id, token_nll

# What computes a site's output in place of the float graph, by its output node.
Setting = Mapping[Node, Callable[..., Tensor]]
FLOAT_SETTING: Setting = {}
Cuts = tuple[Cut, ...]


def setting(sites: Iterable[SimulatedSite], parts: Parts = EVERY_PART) -> Setting:
    """``sites`` run with ``parts`` of their errors, every other site in float."""
    return {each.node: partial(_output, each, parts & frozenset(each.causes)) for each in sites}


def _output(site: SimulatedSite, parts: Parts, *operands: Tensor) -> Tensor:
    return site.output(parts, *operands)


class Lab:
    """Runs the float graph with sites replaced, from cut to cut, over all windows.

    Args:
        gm: a graph at level observed; its observers are not run.
        windows: int64 [b, L] each, run one at a time, so that a dynamic range is of one of them.

    All losses are means over every predicted token of the windows, in nats.
    """

    def __init__(self, gm: GraphModule, windows: tuple[Tensor, ...]) -> None:
        self.gm, self.windows = gm, windows
        self.executor = Executor(gm, skip=observer_nodes(gm))
        self.meter = Meter()
        self._head = final_head(gm)
        self._highest = max(map(highest_id, windows), default=-1)
        self.tokens = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in windows)
        self.tokens_in = sum(ids.numel() for ids in windows)

    def position(self, node: Node) -> int:
        return self.executor.position[node]

    def share_behind(self, node: Node) -> float:
        """The share of the graph's nodes from ``node`` on: what a loss costs that starts there."""
        return 1 - self.position(node) / len(self.executor.nodes)

    def start(self) -> Cuts:
        """A cut before the first node of every window."""
        return tuple(self.executor.start(input_ids=ids) for ids in self.windows)

    @torch.no_grad()
    def advance(self, cuts: Cuts, until: Node, under: Setting) -> Cuts:
        """The cuts moved on to ``until``, which is not run."""
        if cuts and cuts[0].position == self.position(until):
            return cuts
        self._count(cuts[0].position, self.position(until))
        return tuple(self.executor.advance(cut, until, instead=under) for cut in cuts)

    @torch.no_grad()
    def loss(
        self,
        under: Setting,
        cuts: Cuts | None = None,
        advance: Callable[[], object] = lambda: None,
    ) -> float:
        """The loss when the graph is run on from ``cuts`` (None: from the start).

        ``advance`` is called after each window.
        """
        cuts = self.start() if cuts is None else cuts
        sums = []  # read at the end: each read waits for the device
        self._count(cuts[0].position, len(self.executor.nodes))
        for cut, ids in zip(cuts, self.windows, strict=True):
            sums.append(self.nll(cut, ids, under).to(torch.float64).sum())
            advance()
        loss = float(sum(torch.stack(sums).tolist())) / self.tokens
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise NonFiniteError(
                "the loss is NaN or infinite under quantization: a site overflows the model's "
                "dtype; fxquant evaluate names it"
            )
        return loss

    def nll(self, cut: Cut, ids: Tensor, under: Setting) -> Tensor:
        """token_nll [b, L - 1] of one window; the caller chooses the grad mode."""
        head = self._head
        if head is None or head in under:
            done = self.executor.advance(cut, instead=under)
            return token_nll(done.values[self.executor.nodes[-1]], ids, self._highest)
        return nll_to_the_end(self.executor, cut, head, ids, instead=under, highest=self._highest)

    def _count(self, begin: int, end: int) -> None:
        self.meter.count((end - begin) / len(self.executor.nodes))
