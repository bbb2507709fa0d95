"""smooth: move activation outliers into the weights, channel by channel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.absorption import ScaleGroup, scale_groups
from fxquant.errors import CalibrationError, SchemeError
from fxquant.graph import Level, add_note, info, linear_parameters, source_of
from fxquant.observers import ChannelAbsmax
from fxquant.passes.scale_search import ScaleSearch
from fxquant.passes.statistics import observe_nodes
from fxquant.repair import Repair
from fxquant.rescaling import rescale

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

    alpha: float | str = 0.5
    where: str = "default"
    insert: bool = False
    tokens: int = 2048

    def __post_init__(self) -> None:
        known = self.alpha == "auto" or (
            isinstance(self.alpha, (int, float))
            and not isinstance(self.alpha, bool)
            and 0 <= self.alpha <= 1
        )
        if not known:
            raise SchemeError(f"smooth: alpha is a number in [0, 1] or auto, not {self.alpha!r}")
        if self.where not in ("default", "all"):
            raise SchemeError(f"smooth: where is default or all, not {self.where!r}")
        if not isinstance(self.insert, bool):
            raise SchemeError(f"smooth: insert is true or false, not {self.insert!r}")
        if not isinstance(self.tokens, int) or self.tokens < 1:
            raise SchemeError(f"smooth: tokens is a number from 1, not {self.tokens!r}")

    @property
    def readings(self) -> int:
        return 1 + (self.alpha == "auto")

    @property
    def keeps_site_outputs(self) -> bool:
        return self.where == "default"

    def rewrite(self, gm: GraphModule) -> GraphModule:
        groups = [group for group in scale_groups(gm) if self._wants(group)]
        if not groups:
            raise SchemeError(
                f"smooth: scheme {self.scheme} quantizes no activation, so there is nothing to "
                "smooth; take a scheme such as w8a8-static, or awq for weights alone"
            )
        chosen = [group for group in groups if self._can(gm, group)]
        if not chosen:
            raise SchemeError(f"smooth has no effect here: {_reasons(gm, self.name)}")
        observers = {source: ChannelAbsmax(site) for source, site in _sources(chosen)}
        observe_nodes(gm, self.batches, observers, label=self.name, progress=self.progress)
        search = None
        if self.alpha == "auto":
            search = ScaleSearch(gm, self.scheme, self.batches, tokens=self.tokens)
        inserted: list[tuple[ScaleGroup, Tensor]] = []
        changed = 0
        for group in chosen:
            seen = group.gather(
                [observers[source_of(c.node)].max_abs for c in group.consumers], "amax"
            )
            scale = self._scale(gm, group, seen, search)
            if bool((scale == 1).all()):
                continue
            changed += 1
            if group.producer is None:
                inserted.append((group, scale))
            else:
                rescale(gm, group, scale, self.name)
        for group, scale in inserted:  # the search runs on the nodes as they were
            rescale(gm, group, scale, self.name)
        if not changed:
            raise CalibrationError(
                "smooth had no effect: every scale is 1 (alpha=auto: no alpha lowers any error); "
                "leave it out"
            )
        return gm

    def _wants(self, group: ScaleGroup) -> bool:
        specs = (self.scheme.spec_for(c.site.path, c.site.role) for c in group.consumers)
        return any(spec.activation is not None for spec in specs)

    def _can(self, gm: GraphModule, group: ScaleGroup) -> bool:
        """Whether the group is to be smoothed; if not, a note says why."""
        if group.producer is None:
            assert group.obstacle is not None
            obstacle = f"{group.obstacle.reason} (node {group.obstacle.node.name})"
            reason = None if self.insert else obstacle
        elif group.producer.kind == "rows" and self.where == "default":
            reason = f"fed by the rows of {group.producer.path}, which where=all smooths"
        else:
            reason = None
        if reason is not None:
            for consumer in group.consumers:
                add_note(gm, self.name, consumer.site.path, f"not smoothed: {reason}")
        return reason is None

    def _scale(
        self, gm: GraphModule, group: ScaleGroup, seen: Tensor, search: ScaleSearch | None
    ) -> Tensor:
        weights = weight_maxima(gm, group).to(seen.device)
        if search is None:
            assert not isinstance(self.alpha, str)
            return smoothing_scales(seen, weights, self.alpha)
        candidates = [smoothing_scales(seen, weights, alpha) for alpha in _ALPHAS]
        errors = search.errors(group, search.enter(group), [torch.ones_like(seen), *candidates])
        best = errors.index(min(errors))
        chosen = "no smoothing" if best == 0 else f"alpha {_ALPHAS[best - 1]}"
        for consumer in group.consumers:
            add_note(gm, self.name, consumer.site.path, chosen)
        return torch.ones_like(seen) if best == 0 else candidates[best - 1]


def smoothing_scales(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """``max|x|^alpha / max|w|^(1 - alpha)``, float32 [channels]; 1 where an activation is 0."""
    scale = activations.float() ** alpha / weights.float().clamp(min=SMALLEST) ** (1 - alpha)
    return torch.where(activations == 0, 1.0, scale.clamp(min=SMALLEST))


def weight_maxima(gm: GraphModule, group: ScaleGroup) -> Tensor:
    """max|w| over all consumers' columns of each channel: float32 [channels]."""
    weights = (linear_parameters(gm.get_submodule(c.site.path))[0] for c in group.consumers)
    return group.gather([weight.abs().amax(0) for weight in weights], "amax")


def _sources(groups: Iterable[ScaleGroup]) -> Iterable[tuple[Node, str]]:
    for group in groups:
        for consumer in group.consumers:
            yield source_of(consumer.node), consumer.site.path


def _reasons(gm: GraphModule, origin: str) -> str:
    notes = [f"{note.site}: {note.text}" for note in info(gm).notes if note.origin == origin]
    return "; ".join(notes[:3])
