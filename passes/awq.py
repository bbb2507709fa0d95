"""awq: protect the weights that large activations meet, then clip what is left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.absorption import ScaleGroup, scale_groups
from fxquant.errors import CalibrationError, SchemeError
from fxquant.graph import (
    CodedLinear,
    Level,
    Site,
    add_note,
    coded_linears,
    install,
    linear_parameters,
    source_of,
)
from fxquant.passes.clip_search import GroupGram, clipped_codes
from fxquant.passes.query_key import query_key_linears
from fxquant.passes.scale_search import ScaleSearch
from fxquant.passes.weight_codes import min_max_codes
from fxquant.repair import Repair
from fxquant.rescaling import rescale
from fxquant.sequential import SequentialRun
from fxquant.specs import TensorSpec

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
    tokens: int = 512
    balanced: bool = False

    def __post_init__(self) -> None:
        if not all(isinstance(flag, bool) for flag in (self.scale, self.clip, self.balanced)):
            raise SchemeError("awq: scale, clip and balanced are true or false")
        if not (self.scale or self.clip):
            raise SchemeError("awq: with scale=false and clip=false there is nothing to do")
        if not isinstance(self.tokens, int) or self.tokens < 1:
            raise SchemeError(f"awq: tokens is a number from 1, not {self.tokens!r}")

    @property
    def readings(self) -> int:
        return self.scale + self.clip

    @property
    def keeps_site_outputs(self) -> bool:
        return False

    def rewrite(self, gm: GraphModule) -> GraphModule:
        if next(coded_linears(gm, self.scheme), None) is None:
            raise SchemeError(f"awq: scheme {self.scheme} quantizes no weight")
        changed = self._search_scales(gm) if self.scale else 0
        if self.clip:
            changed += self._choose_codes(gm)
        if not changed:
            raise CalibrationError(
                "awq had no effect: no scale and no clipping lowers the error of any linear; "
                "leave it out"
            )
        return gm

    def _spec(self, site: Site) -> TensorSpec | None:
        return self.scheme.spec_for(site.path, site.role).weight

    def _search_scales(self, gm: GraphModule) -> int:
        """How many groups got a scale other than 1."""
        search = ScaleSearch(
            gm, self.scheme, self.batches, tokens=self.tokens, balanced=self.balanced
        )
        changed = 0
        for group in scale_groups(gm):
            if not any(self._spec(consumer.site) for consumer in group.consumers):
                continue
            if group.producer is None:
                assert group.obstacle is not None
                self._note(gm, group, f"not scaled: {group.obstacle.reason}")
                continue
            inputs = search.enter(group)
            means = [inputs[source_of(c.node)].abs().float().mean(0) for c in group.consumers]
            candidates = [awq_scales(group, means, ratio) for ratio in _RATIOS]
            errors = search.errors(group, inputs, candidates)
            best = errors.index(min(errors))
            share = min(errors) / errors[0] if errors[0] else 1.0
            self._note(gm, group, f"scaled: r = {_RATIOS[best]:g}, error {share:.3g} of unscaled")
            if best:
                rescale(gm, group, candidates[best], self.name)
                changed += 1
        return changed

    def _note(self, gm: GraphModule, group: ScaleGroup, text: str) -> None:
        for consumer in group.consumers:
            add_note(gm, self.name, consumer.site.path, text)

    def _choose_codes(self, gm: GraphModule) -> int:
        """How many weights got other codes than rounding to nearest gives."""
        skipped = query_key_linears(gm)
        run = SequentialRun(gm, self.batches, label=self.name, progress=self.progress)
        changed = 0
        for segment in run.segments:
            linears = [
                (site, node, spec)
                for site, node in segment.sites
                if (spec := self._spec(site)) is not None and site.path not in skipped
            ]
            grams = {
                (source_of(node), spec.group_size): GroupGram(site.path, spec.group_size)
                for site, node, spec in linears
            }

            def on_value(
                node: Node,
                value: Tensor,
                mask: Tensor,
                grams: dict[tuple[Node, int | None], GroupGram] = grams,
            ) -> Tensor:
                for (source, _), gram in grams.items():
                    if node is source:
                        gram(value, mask)
                return value

            if segment.end is not None:
                run.advance(segment.end, on_value)
            elif linears:  # what lies behind the last linear, a head say, is not asked for
                run.visit(linears[-1][1], on_value)
            for site, node, spec in linears:
                gram = grams[source_of(node), spec.group_size].gram
                changed += self._clip(gm, site, spec, gram)
        return changed

    def _clip(self, gm: GraphModule, site: Site, spec: TensorSpec, gram: Tensor) -> bool:
        module = gm.get_submodule(site.path)
        if isinstance(module, CodedLinear):
            raise SchemeError(
                f"awq: {site.path}: an earlier pass has chosen its codes; write +awq before it"
            )
        weight, bias = linear_parameters(module)
        nearest = min_max_codes(weight, spec, site.path)
        chosen = clipped_codes(weight, spec, gram)
        install(gm, site.path, CodedLinear(weight, bias, spec, chosen.tensors()))
        return not torch.equal(nearest.codes, chosen.codes)


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
