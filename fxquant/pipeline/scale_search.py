"""Which scale of a group of linears leaves the least error behind: measured on the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import CalibrationError
from fxquant.ir.graph import device_of, info, linear_parameters, linear_sites, source_of, tag
from fxquant.numerics.observers import HistogramObserver, attended
from fxquant.numerics.quantizer import Quantizer
from fxquant.numerics.static_input import static_quantizer
from fxquant.run.batches import Batches, model_inputs
from fxquant.run.execution import Cut, Executor
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import ActivationSpec
from fxquant.structure.absorption import Consumer, ScaleGroup
from fxquant.structure.vocabulary import Kind, is_a


def join_of(gm: GraphModule, group: ScaleGroup) -> Node:
    """Where a group's error is measured.

    One consumer: its own output. Several: the first node that depends on all of them, carried on
    to the next linear while one node alone reads it: out_proj for q, k and v, down_proj for gate
    and up; the sum where attention and MLP stand side by side.
    """
    nodes = [consumer.node for consumer in group.consumers]
    if len(nodes) == 1:
        return nodes[0]
    behind: dict[Node, int] = {node: 1 << index for index, node in enumerate(nodes)}
    everything = (1 << len(nodes)) - 1
    for node in gm.graph.nodes:
        for used in node.all_input_nodes:
            behind[node] = behind.get(node, 0) | behind.get(used, 0)
        if behind.get(node) == everything:
            return _carried_on(node)
    raise AssertionError(f"{group.names()}: their outputs never meet")


def _carried_on(node: Node) -> Node:
    while not tag(node).is_output:
        users = [user for user in node.users if not is_a(user, Kind.SHAPE)]
        if len(users) != 1 or users[0].op == "output":
            break
        node = users[0]
    return node


@dataclass(frozen=True)
class _Trial:
    """A consumer under one scale: x / factors and ``weight`` already quantized, float32."""

    factors: Tensor
    weight: Tensor
    bias: Tensor | None
    quantizer: Quantizer | None

    def __call__(self, x: Tensor) -> Tensor:
        scaled = x.float() / self.factors
        if self.quantizer is not None:
            scaled = self.quantizer(scaled)
        return nn.functional.linear(scaled, self.weight, self.bias).to(x.dtype)


class ScaleSearch:
    """Tries scales of one group after another, in graph order, on calibration tokens.

    For a group, the graph runs from its producer to ``join_of`` with the group's linears in float
    and then, for each scale s, quantized as the scheme says: weights W s rounded to nearest,
    activations x / s with ranges from the same tokens. Everything else is float, with what
    earlier groups have become. Each batch keeps one cut, so all groups together cost one run of
    the data beside the trials.

    Args:
        tokens: about how many calibration tokens to use; whole batches, at least one.
        balanced: a token whose output is larger than the median token's counts relative to it.
            Plain sums of squares, as in AWQ's code, are mostly those of the few tokens with massive
            activations; on SmolLM2 at 3 bits they choose the better scales all the same.

    Raises CalibrationError for unusable batches and where there is no token.
    """

    def __init__(
        self,
        gm: GraphModule,
        scheme: Scheme,
        batches: Batches | None,
        *,
        tokens: int,
        balanced: bool = True,
    ) -> None:
        self._balanced = balanced
        self._gm, self._scheme = gm, scheme
        self._trials: dict[Node, _Trial] = {}
        instead = {node: self._stand_in(node, site.path) for site, node in linear_sites(gm)}
        self._executor = Executor(gm, instead=instead)
        self._masks: list[Tensor] = []
        self._cuts: list[Cut] = []
        facts, device = info(gm), device_of(gm)
        seen = 0
        for index, batch in enumerate(batches or ()):
            inputs = {k: v.to(device) for k, v in model_inputs(batch, facts, index).items()}
            ids = inputs["input_ids"]
            self._masks.append(inputs.get("attention_mask", torch.ones_like(ids)))
            self._cuts.append(self._executor.start(**inputs))
            seen += int(self._masks[-1].sum())
            if seen >= tokens:
                break
        if seen == 0:
            raise CalibrationError("the search for scales saw no token: give calibration batches")

    @torch.no_grad()
    def enter(self, group: ScaleGroup) -> dict[Node, Tensor]:
        """Go to the group's producer; returns the attended inputs [tokens, K] by source node.

        Groups must come in graph order; scales are applied to the graph between them.
        """
        run = self._executor
        with run.holding(self._cuts[0].position, group.start):
            self._cuts = [run.advance(cut, group.start) for cut in self._cuts]
        join = join_of(self._gm, group)
        self._end = run.nodes[run.position[join] + 1]
        self._join = join
        sources = {source_of(consumer.node) for consumer in group.consumers}
        rows: dict[Node, list[Tensor]] = {source: [] for source in sources}
        self._expected = []
        for cut, mask in zip(self._cuts, self._masks, strict=True):

            def on_node(node: Node, value: Any, mask: Tensor = mask) -> Any:
                if node in rows:
                    rows[node].append(attended(value, mask))
                return value

            self._expected.append(run.advance(cut, self._end, on_node).values[join])
        first = min((c.node for c in group.consumers), key=run.position.__getitem__)
        self._ready = [run.advance(cut, first) for cut in self._cuts]
        return {source: torch.cat(values) for source, values in rows.items()}

    @torch.no_grad()
    def errors(
        self, group: ScaleGroup, inputs: Mapping[Node, Tensor], scales: Sequence[Tensor]
    ) -> list[float]:
        """Weighted sum of attended tokens' squared errors, for each scale float32 [channels].

        ``inputs`` is what ``enter`` returned for this group.
        """
        outputs = zip(self._expected, self._masks, strict=True)
        sizes = [attended(y, mask).double().square().sum(-1) for y, mask in outputs]
        usual = torch.cat(sizes).median()
        found = []
        for scale in scales:
            ranges: dict[tuple[Node, ActivationSpec], Quantizer] = {}
            self._trials = {
                consumer.node: self._trial(consumer, scale, inputs, ranges)
                for consumer in group.consumers
            }
            error = 0.0
            batches = zip(self._ready, self._masks, self._expected, sizes, strict=True)
            for cut, mask, expected, size in batches:
                value = self._executor.advance(cut, self._end).values[self._join]
                rows = attended(value.float() - expected.float(), mask)
                squares = rows.double().square().sum(-1)
                if self._balanced:
                    squares = squares / torch.maximum(size, usual).clamp(min=1e-300)
                error += float(squares.sum())
            found.append(math.inf if math.isnan(error) else error)  # or NaN would be the least
        self._trials = {}
        return found

    def _trial(
        self,
        consumer: Consumer,
        scale: Tensor,
        inputs: Mapping[Node, Tensor],
        ranges: dict[tuple[Node, ActivationSpec], Quantizer],
    ) -> _Trial:
        spec = self._scheme.spec_for(consumer.site.path, consumer.site.role)
        weight, bias = linear_parameters(self._gm.get_submodule(consumer.site.path))
        factors = scale[consumer.columns.to(scale.device)]
        scaled = weight.float() * factors
        if spec.weight is not None:
            scaled = Quantizer(spec.weight)(scaled)
        quantizer = None if spec.activation is None else Quantizer(spec.activation.tensor)
        if spec.activation is not None and not spec.activation.dynamic:
            key = (source_of(consumer.node), spec.activation)
            if key not in ranges:
                x = inputs[key[0]].float() / factors
                observer = HistogramObserver(consumer.site.path).to(x.device)
                observer(x, torch.ones(1, len(x), dtype=torch.bool, device=x.device))
                ranges[key] = static_quantizer(observer, spec.activation)
            quantizer = ranges[key]
        return _Trial(factors, scaled, None if bias is None else bias.float(), quantizer)

    def _stand_in(self, node: Node, path: str) -> Callable[[Tensor], Tensor]:
        def linear(x: Tensor) -> Tensor:
            trial = self._trials.get(node)
            y: Tensor = self._gm.get_submodule(path)(x) if trial is None else trial(x)
            return y

        return linear
