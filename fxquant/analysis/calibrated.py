"""What sites saw while calibrating, and the scales that ``+smooth`` would give them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.analysis.lab import Lab
from fxquant.analysis.sites import LinearSite, SimulatedSite
from fxquant.ir.graph import linear_sites, source_of
from fxquant.numerics.observers import ChannelAbsmax, attended
from fxquant.passes.correct_bias import without_observers
from fxquant.passes.smooth import Smooth, group_scale
from fxquant.structure.absorption import ScaleGroup, scale_groups

READ_TOKENS = 2048  # of calibration data that choices at a site are made from


@dataclass
class Calibrated:
    """One site: its attended inputs [T, K] by batch, and what ``+smooth`` would divide its input's
    columns by, float32 [K], where it is a linear."""

    rows: list[Tensor] = field(default_factory=list)
    smoothing: Tensor | None = None


@torch.no_grad()
def calibration_inputs(
    lab: Lab, sites: Sequence[SimulatedSite], batches: Iterable[dict[str, Tensor]]
) -> dict[str, Calibrated]:
    """What reaches each of ``sites`` in the float graph; products of activations stay empty.

    The first batches are read, until they hold READ_TOKENS that are no padding. A scale is shared
    by all linears that read what takes it, so their inputs are seen too.
    """
    found = {each.path: Calibrated() for each in sites}
    linears = [each for each in sites if isinstance(each, LinearSite)]
    if not linears:
        return found
    plain = without_observers(lab.gm)
    wanted = {each.path for each in linears}
    groups = [
        group
        for group in scale_groups(plain)
        if any(consumer.site.path in wanted for consumer in group.consumers)
    ]
    sources = _sources(lab, groups)
    seen = {source: ChannelAbsmax(path) for path, source in reversed(sources.items())}
    for observer in seen.values():
        observer.to(linears[0].weight.device)
    executor = lab.executor
    end = executor.nodes[max(executor.position[source] for source in seen) + 1]
    for inputs in first_batches(batches, READ_TOKENS):
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))

        def keep(node: Node, value: Tensor, mask: Tensor = mask) -> Tensor:
            if node in seen:
                seen[node](value, mask)
                for path in wanted:
                    if sources[path] is node:
                        found[path].rows.append(attended(value, mask))
            return value

        executor.advance(executor.start(**inputs), end, keep)
    for group in groups:
        peaks = [seen[sources[consumer.site.path]].max_abs for consumer in group.consumers]
        if any(peak.numel() == 0 for peak in peaks):  # no attended token
            continue
        scale = group_scale(plain, group, peaks, _alpha())
        for consumer in group.consumers:
            if consumer.site.path in wanted:
                found[consumer.site.path].smoothing = scale[consumer.columns.to(scale.device)]
    return found


def first_batches(batches: Iterable[dict[str, Tensor]], tokens: int) -> Iterator[dict[str, Tensor]]:
    """The first batches that hold ``tokens`` together, all where there are fewer; others are not
    even taken."""
    left = tokens
    for batch in batches:
        yield batch
        left -= attended_tokens(batch)
        if left <= 0:
            return


def attended_tokens(batch: dict[str, Tensor]) -> int:
    """How many of a batch's tokens are no padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def _sources(lab: Lab, groups: Sequence[ScaleGroup]) -> dict[str, Node]:
    """The input of every consumer, in the lab's graph."""
    paths = {consumer.site.path for group in groups for consumer in group.consumers}
    return {site.path: source_of(node) for site, node in linear_sites(lab.gm) if site.path in paths}


def _alpha() -> float:
    """That of the repair as a scheme names it without options."""
    alpha = Smooth().alpha
    assert not isinstance(alpha, str)
    return alpha
