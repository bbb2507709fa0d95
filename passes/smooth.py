"""smooth: move activation outliers into the weights, channel by channel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.ir.graph import Level, linear_parameters, source_of
from fxquant.numerics.observers import ChannelAbsmax
from fxquant.pipeline.context import Context
from fxquant.pipeline.options import Count, Share
from fxquant.pipeline.repair import Repair
from fxquant.pipeline.scale_search import ScaleSearch
from fxquant.run.observe_nodes import observe_nodes
from fxquant.schemes.scheme import Scheme
from fxquant.structure.absorption import ScaleGroup, scale_groups
from fxquant.structure.outcome import Blocked, Changed, Outcome
from fxquant.structure.rescaling import rescale

SMALLEST = 1e-5  # of a scale and of max|W|, as the paper's code clamps
_ALPHAS = tuple(round(0.1 * step, 1) for step in range(1, 11))


@dataclass(frozen=True)
class Smooth(Repair):
    """SmoothQuant (Xiao et al. 2022, arXiv:2211.10438, equation 4).

    before:  x = layer_norm(h);               y = fc1(x)
    after:   x = layer_norm(h) [gain / s];    y = fc1(x) [columns * s]

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), at least 1e-5, over calibration and over all
    linears that read channel j. A channel that was 0 throughout calibration keeps scale 1 (the
    paper's code would multiply its producer by 1e5).

    Options: ``alpha`` in [0, 1], or "auto": for each group the one of 0.1, 0.2, ..., 1 (or no
    smoothing) with the least error of the block's output, see ScaleSearch. ``where``: "default",
    what a norm feeds (q, k, v; fc1; gate and up), or "all", also what comes from the rows of a
    linear (out_proj through the values, fc2 through ReLU, down_proj through the product).
    ``insert``: place a ``mul`` node where nothing can take the scale. ``tokens``: of calibration
    that "auto" searches on.
    """

    name = "smooth"
    requires = (Level.FLOAT,)
    effect = "equivalent"
    no_place = (
        "quantizes no activation, so there is nothing to smooth; take a scheme such as "
        "w8a8-static, or awq for weights alone"
    )

    alpha: Share | Literal["auto"] = 0.5
    where: Literal["default", "all"] = "default"
    insert: bool = False
    tokens: Count = 2048

    @property
    def readings(self) -> int:
        return 1 + (self.alpha == "auto")

    @property
    def keeps_site_outputs(self) -> bool:
        return self.where == "default"

    def apply(self, gm: GraphModule, context: Context) -> Iterator[Outcome]:
        groups = [group for group in scale_groups(gm) if _wants(group, context.scheme)]
        obstacles = [self._obstacle(group) for group in groups]
        chosen = []
        for group, obstacle in zip(groups, obstacles, strict=True):
            if obstacle is None:
                chosen.append(group)
            else:
                yield from group.outcomes(obstacle)
        if not chosen:
            return
        observers = {source: ChannelAbsmax(site) for source, site in _sources(chosen)}
        observe_nodes(gm, observers, context.batches, label=self.name, progress=context.progress)
        search = None
        if self.alpha == "auto":
            search = ScaleSearch(gm, context.scheme, context.batches, tokens=self.tokens)
        inserted: list[tuple[ScaleGroup, Tensor]] = []
        for group in chosen:
            inputs = [observers[source_of(c.node)].max_abs for c in group.consumers]
            scale, note = self._scale(gm, group, inputs, search)
            if bool((scale == 1).all()):
                yield from group.outcomes(Blocked(note or "not smoothed: every scale is 1"))
                continue
            yield from group.outcomes(Changed(note))
            if group.producer is None:
                inserted.append((group, scale))
            else:
                rescale(gm, group, scale, self.name)
        for group, scale in inserted:  # the search runs on the nodes as they were
            rescale(gm, group, scale, self.name)

    def _obstacle(self, group: ScaleGroup) -> Blocked | None:
        """Why the group is not to be smoothed; None where it is."""
        if group.producer is None and not self.insert:
            assert group.obstacle is not None
            names = ", ".join(node.name for node in group.obstacle.nodes)
            reason = f"not smoothed: {group.obstacle.reason} (node {names})"
            return Blocked(reason, group.obstacle.nodes)
        if group.producer is None or group.producer.kind != "rows" or self.where == "all":
            return None
        path = group.producer.path
        return Blocked(f"not smoothed: fed by the rows of {path}, which where=all smooths")

    def _scale(
        self,
        gm: GraphModule,
        group: ScaleGroup,
        inputs: list[Tensor],
        search: ScaleSearch | None,
    ) -> tuple[Tensor, str]:
        """The group's scale, and what is to be said about it."""
        if search is None:
            assert not isinstance(self.alpha, str)
            return group_scale(gm, group, inputs, self.alpha), ""
        candidates = [group_scale(gm, group, inputs, alpha) for alpha in _ALPHAS]
        none = torch.ones_like(candidates[0])
        errors = search.errors(group, search.enter(group), [none, *candidates])
        best = errors.index(min(errors))
        if best == 0:
            return none, "no smoothing"
        return candidates[best - 1], f"alpha {_ALPHAS[best - 1]}"


def _wants(group: ScaleGroup, scheme: Scheme) -> bool:
    specs = (scheme.spec_for(c.site.path, c.site.role) for c in group.consumers)
    return any(spec.activation is not None for spec in specs)


def smoothing_scales(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """``max|x|^alpha / max|w|^(1 - alpha)``, float32 [channels]; 1 where an activation is 0."""
    scale = activations.float() ** alpha / weights.float().clamp(min=SMALLEST) ** (1 - alpha)
    return torch.where(activations == 0, 1.0, scale.clamp(min=SMALLEST))


def group_scale(gm: GraphModule, group: ScaleGroup, inputs: list[Tensor], alpha: float) -> Tensor:
    """The scale that all of the group share: float32 [channels]; see ``smoothing_scales``.

    ``inputs``: max|x| of each consumer's input columns, [K] each.
    """
    seen = group.gather(inputs, "amax")
    return smoothing_scales(seen, weight_maxima(gm, group).to(seen.device), alpha)


def weight_maxima(gm: GraphModule, group: ScaleGroup) -> Tensor:
    """max|w| over all consumers' columns of each channel: float32 [channels]."""
    weights = (linear_parameters(gm.get_submodule(c.site.path))[0] for c in group.consumers)
    return group.gather([weight.abs().amax(0) for weight in weights], "amax")


def _sources(groups: Iterable[ScaleGroup]) -> Iterable[tuple[Node, str]]:
    for group in groups:
        for consumer in group.consumers:
            yield source_of(consumer.node), consumer.site.path
