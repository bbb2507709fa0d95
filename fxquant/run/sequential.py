"""Run every calibration batch through the graph block by block, while leaves change in between.

A repair that must see what earlier, already quantized blocks produce would otherwise read the data
once per block. Here each batch keeps one Cut, and a pass over all blocks costs one run of the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from tqdm import tqdm

from fxquant.errors import CalibrationError
from fxquant.ir.blocks import block_of, block_starts
from fxquant.ir.graph import Site, device_of, info, linear_sites
from fxquant.run.batches import Batches, model_inputs
from fxquant.run.execution import Cut, Executor

OnValue = Callable[[Node, Any, Tensor], Any]


@dataclass(frozen=True)
class Segment:
    """The nodes of one decoder block: from ``first`` up to, not including, ``end`` (None: the end).

    ``sites`` holds the block's sites with their output nodes, in graph order.
    """

    block: str
    first: Node
    end: Node | None
    sites: tuple[tuple[Site, Node], ...]


def segments(gm: GraphModule) -> tuple[Segment, ...]:
    """The decoder blocks in graph order, then what follows them if a site stands there (the head).

    Blocks without a site are no segment.
    """
    blocks = list(block_starts(gm).first.items())
    ends = [node for _, node in blocks[1:]] + [None]
    sites = list(linear_sites(gm))
    found: list[Segment] = []
    for (block, first), end in zip(blocks, ends, strict=True):
        inside = tuple(pair for pair in sites if block_of(pair[0].path, (block,)))
        if inside:
            found.append(Segment(block, first, end, inside))
    behind = tuple(pair for pair in sites if pair[0].role == "head")
    if behind:
        head = behind[0][1]
        if found and found[-1].end is None:
            last = found[-1]
            found[-1] = Segment(last.block, last.first, head, last.sites)
        found.append(Segment(behind[0][0].path, head, None, behind))
    return tuple(found)


class SequentialRun:
    """All ``batches``, each stopped at the same place of the graph.

        run = SequentialRun(gm, batches, label="gptq")
        for segment in run.segments:
            run.visit(segment.end, statistics)   # as the block is now; the cuts stay
            ...                                  # install other leaves; the nodes stay
            run.advance(segment.end)             # with the leaves as they are now

    ``visit`` and ``advance`` hand every value that is alive at the cut, then every computed one, to
    ``on_value(node, value, mask)``, which returns what goes on in its place; ``mask`` is the
    batch's attention mask int64 [batch, length]. The batches are read once, at construction.
    Memory: per batch, what is alive at the cut (the residual stream, masks, rotary tables).

    Attributes: ``segments``, ``tokens`` (attended ones), ``digest`` (sha256 of the batches).
    Raises CalibrationError for unusable batches, no batch, or no attended token.
    """

    def __init__(
        self, gm: GraphModule, batches: Batches | None, *, label: str, progress: bool = False
    ) -> None:
        self.segments = segments(gm)
        self._executor = Executor(gm)
        self._label = label
        self._quiet = None if progress else True  # None: quiet where the output is no terminal
        if batches is None:
            raise CalibrationError(f"{label} needs calibration data: pass calibration=batches")
        if not self.segments:
            raise CalibrationError(f"{label}: {info(gm).model} has no block with a site to visit")
        self._cuts, self._masks = self._start(gm, batches)

    @torch.no_grad()
    def _start(self, gm: GraphModule, batches: Batches) -> tuple[list[Cut], list[Tensor]]:
        facts, device = info(gm), device_of(gm)
        cuts: list[Cut] = []
        masks: list[Tensor] = []
        digest = hashlib.sha256()
        for index, batch in enumerate(batches):
            inputs = {k: v.to(device) for k, v in model_inputs(batch, facts, index).items()}
            ids = inputs["input_ids"]
            masks.append(inputs.get("attention_mask", torch.ones_like(ids)))
            for value in (ids, masks[-1]):
                digest.update(f"{list(value.shape)} {value.tolist()}".encode())
            cuts.append(self._executor.start(**inputs))
        self.digest = digest.hexdigest()
        first = self.segments[0].first
        with self._executor.holding(0, first):
            cuts = [self._executor.advance(cut, first) for cut in cuts]
        self.tokens = sum(int(mask.sum()) for mask in masks)
        if self.tokens == 0:
            raise CalibrationError(
                f"{self._label} saw no token: the batches are empty or fully masked (was a "
                "one-shot iterator used up?)"
            )
        return cuts, masks

    def visit(self, until: Node | None, on_value: OnValue) -> None:
        """Run every batch from its cut up to, not including, ``until``; the cuts stay."""
        self._run(until, on_value)

    def advance(self, until: Node | None, on_value: OnValue | None = None) -> None:
        """The same, and the cuts move to ``until``."""
        self._cuts = self._run(until, on_value, keep=True)

    @torch.no_grad()
    def _run(self, until: Node | None, on_value: OnValue | None, keep: bool = False) -> list[Cut]:
        begin = self._cuts[0].position if self._cuts else 0
        with self._executor.holding(begin, until):
            return self._run_held(until, on_value, keep)

    def _run_held(self, until: Node | None, on_value: OnValue | None, keep: bool) -> list[Cut]:
        found: list[Cut] = []
        cuts = tqdm(self._cuts, self._label, unit="batch", leave=False, disable=self._quiet)
        for cut, mask in zip(cuts, self._masks, strict=True):
            if on_value is None:
                after = self._executor.advance(cut, until)
            else:
                on_node = _with_mask(on_value, mask)
                alive = {node: on_node(node, value) for node, value in cut.values.items()}
                after = self._executor.advance(Cut(cut.position, alive), until, on_node)
            if keep:
                found.append(after)
        return found


def _with_mask(on_value: OnValue, mask: Tensor) -> Callable[[Node, Any], Any]:
    return lambda node, value: on_value(node, value, mask)
