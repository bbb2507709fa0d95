"""awq: protect the weights that large activations meet, then clip what is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.errors import SchemeError
from fxquant.ir.graph import Level, Site, coded_linears, source_of
from fxquant.ir.weights import choose_codes
from fxquant.numerics.solvers.clip_search import clipped_codes
from fxquant.pipeline.context import Context
from fxquant.pipeline.options import Count
from fxquant.pipeline.repair import Repair
from fxquant.pipeline.scale_search import ScaleSearch
from fxquant.run.gram import Gram
from fxquant.run.sequential import SequentialRun
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import TensorSpec
from fxquant.structure.absorption import ScaleGroup, scale_groups
from fxquant.structure.outcome import Blocked, Changed, Outcome
from fxquant.structure.query_key import query_key_linears
from fxquant.structure.rescaling import rescale

_RATIOS = tuple(step / 20 for step in range(20))
_SMALLEST = 1e-4


@dataclass(frozen=True)
class Awq(Repair):
    """Activation-aware weight quantization (Lin et al. 2023, arXiv:2306.00978, equation 5).

    before:  x = norm(h);             y = fc1(x)
    after:   x = norm(h) [gain / s];  y = fc1(x) [columns * s; codes chosen with clipped ranges]

    Scales: s = mean|x|^r, at least 1e-4, divided by sqrt(max s * min s), with r out of 0, 0.05,
    ..., 0.95 that leaves the least error of the block's output (see ScaleSearch). Every group
    whose scale something can take is searched, in graph order. Clipping: each row's or group's
    range is cut to 1, 0.95, ... 0.55 of max|w|, whichever disturbs the output least; linears that
    make queries and keys are left, as in the paper's code. Only codes are chosen there: the float
    function stays, and a later gptq starts from these ranges.

    Options: ``scale``, ``clip``: which of the two to do. ``tokens``: of calibration that the
    search for scales uses; clipping uses all. ``balanced``: see ScaleSearch; false, the
    default, is the paper's plain sum of squares.
    """

    name = "awq"
    requires = (Level.FLOAT,)
    effect = "equivalent"

    scale: bool = True
    clip: bool = True
    tokens: Count = 512
    balanced: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.scale or self.clip):
            raise SchemeError("awq: with scale=false and clip=false there is nothing to do")

    @property
    def readings(self) -> int:
        return self.scale + self.clip

    @property
    def keeps_site_outputs(self) -> bool:
        return False

    def apply(self, gm: GraphModule, context: Context) -> Iterator[Outcome]:
        if next(coded_linears(gm, context.scheme), None) is None:
            return
        if self.scale:
            yield from self._search_scales(gm, context)
        if self.clip:
            yield from self._choose_codes(gm, context)

    def _search_scales(self, gm: GraphModule, context: Context) -> Iterator[Outcome]:
        search = ScaleSearch(
            gm, context.scheme, context.batches, tokens=self.tokens, balanced=self.balanced
        )
        for group in scale_groups(gm):
            if not any(_spec(context.scheme, consumer.site) for consumer in group.consumers):
                continue
            if group.producer is None:
                assert group.obstacle is not None
                reason = f"not scaled: {group.obstacle.reason}"
                yield from group.outcomes(Blocked(reason, group.obstacle.nodes))
                continue
            inputs = search.enter(group)
            means = [inputs[source_of(c.node)].abs().float().mean(0) for c in group.consumers]
            candidates = [awq_scales(group, means, ratio) for ratio in _RATIOS]
            errors = search.errors(group, inputs, candidates)
            best = errors.index(min(errors))
            share = errors[best] / errors[0] if best else 1.0
            text = f"scaled: r = {_RATIOS[best]:g}, error {share:.3g} of unscaled"
            yield from group.outcomes(Changed(text) if best else Blocked(text))
            if best:
                rescale(gm, group, candidates[best], self.name)

    def _choose_codes(self, gm: GraphModule, context: Context) -> Iterator[Outcome]:
        skipped = query_key_linears(gm)
        run = SequentialRun(gm, context.batches, label=self.name, progress=context.progress)
        for segment in run.segments:
            linears = [
                (site, node, spec)
                for site, node in segment.sites
                if (spec := _spec(context.scheme, site)) is not None and site.path not in skipped
            ]
            grams = {
                (source_of(node), spec.group_size): Gram(
                    source_of(node), site.path, spec.group_size
                )
                for site, node, spec in linears
            }
            on_value = partial(_show, tuple(grams.values()))
            if segment.end is not None:
                run.advance(segment.end, on_value)
            elif linears:  # what lies behind the last linear, a head say, is not asked for
                run.visit(linears[-1][1], on_value)
            for site, node, spec in linears:
                gram = grams[source_of(node), spec.group_size].sums()
                choose = partial(clipped_codes, spec=spec, gram=gram)
                changed = choose_codes(gm, site.path, spec, choose, self.name)
                yield site.path, Changed() if changed else Blocked("no narrower range is better")


def _show(grams: tuple[Gram, ...], node: Node, value: Tensor, mask: Tensor) -> Tensor:
    for gram in grams:
        gram(node, value, mask)
    return value


def _spec(scheme: Scheme, site: Site) -> TensorSpec | None:
    return scheme.spec_for(site.path, site.role).weight


def awq_scales(group: ScaleGroup, means: list[Tensor], ratio: float) -> Tensor:
    """``mean|x|^ratio / sqrt(max * min)``, float32 [channels]; 1 where no column reads a channel.

    ``means`` float32 [K], mean|x| of each consumer's input columns.
    """
    seen = group.gather(means, "mean")
    columns = torch.cat([consumer.columns for consumer in group.consumers]).unique()
    columns = columns.to(seen.device)
    scale = seen[columns].pow(ratio).clamp(min=_SMALLEST)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return torch.ones_like(seen).index_copy_(0, columns, scale)
