"""A small batch on which graphs are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.ir.graph import device_of, info, tag
from fxquant.ir.legal_forms import observer_nodes
from fxquant.run.execution import Executor


@dataclass(frozen=True)
class Probe:
    """A small batch with padding on which passes are compared."""

    input_ids: Tensor
    attention_mask: Tensor

    @classmethod
    def random(
        cls, vocab_size: int, device: torch.device, batch: int = 2, length: int = 12
    ) -> Probe:
        """Deterministic tokens; the first row is padded on the left, the last on the right."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        if length > 2:
            mask[0, : length // 3] = 0
            mask[-1, length - length // 4 :] = 0
        return cls(ids.to(device), mask.to(device))

    def attended(self, x: Tensor) -> Tensor:
        """What x, logits or a site's output, holds for tokens that are not padding: [rows, ...].

        What a query of padding gives depends on kernel and device. x is [batch, L, ...],
        [batch * L, ...], [batch, heads, L, ...] or [batch * heads, L, ...]; all of x where its
        shape is none of these.
        """
        batch, length = self.attention_mask.shape
        mask = self.attention_mask.bool()
        if x.dim() == 2 and len(x) == batch * length:
            return x[mask.flatten()]
        if x.dim() == 4 and x.shape[0] == batch and x.shape[2] == length:
            return x.transpose(1, 2)[mask]
        if x.dim() < 3 or x.shape[1] != length or x.shape[0] % batch:
            return x
        return x[mask.repeat_interleave(x.shape[0] // batch, 0)]


@torch.no_grad()
def run_probe(
    gm: GraphModule, probe: Probe, forced: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and each site's output on the probe.

    Outputs in ``forced`` (by site) replace the computed ones, so that every site is compared on
    the very inputs it had before, and differences cannot add up along the graph.
    """
    outputs: dict[str, Tensor] = {}

    def on_node(node: Node, value: Tensor) -> Tensor:
        if not tag(node).is_output:
            return value
        site = tag(node).site or ""
        outputs[site] = value
        return forced.get(site, value)

    # An observer that saw the probe would calibrate on it.
    # The user's autocast would round the float side of a comparison only.
    with torch.autocast(probe.input_ids.device.type, enabled=False):
        logits = Executor(gm, skip=observer_nodes(gm)).run(
            on_node, input_ids=probe.input_ids, attention_mask=probe.attention_mask
        )
    return logits, outputs


def relative_difference(before: Tensor, after: Tensor) -> float:
    """max |after - before| / max |before|; infinite where shapes, NaN or infinities differ."""
    if before.shape != after.shape or before.dtype != after.dtype:
        return float("inf")
    if torch.equal(before, after):
        return 0.0
    largest = before.abs().max().clamp(min=torch.finfo(before.dtype).tiny)
    difference = float((after.double() - before.double()).abs().max() / largest)
    return difference if difference == difference else float("inf")


def probe_for(gm: GraphModule) -> Probe:
    """The batch on which passes on ``gm`` are compared."""
    facts = info(gm)
    length = min(12, facts.max_positions or 12)
    return Probe.random(facts.vocab_size, device_of(gm), length=length)
