"""Codes of an input by compressed-tensors' own rules, as transformers simulates them."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.exports.compressed_forms import fixes_global_scale
from fxquant.exports.sites import CodedSite, coded_sites
from fxquant.formats.floating import E2M1, E4M3
from fxquant.formats.integer import IntegerGrid
from fxquant.formats.scales import E4M3_SCALE, PowerScale
from fxquant.ir.graph import clone_sharing_storage
from fxquant.ir.operands import operands
from fxquant.numerics.observers import ChannelAbsmax
from fxquant.pipeline.recording import SizedRecording, remember
from fxquant.run.batches import Batches
from fxquant.run.encodings import batches_of
from fxquant.run.observe_nodes import observe_nodes

GLOBAL: Final = "input_global_scale"
_LOWEST, _HIGHEST = -128, 127
_ZERO_E4M3: Final = 0.125  # the scale of a group whose own rounds to zero
_BIAS: Final = 127


def fixed_scales(gm: GraphModule, batches: Batches | None) -> tuple[GraphModule, dict[str, Tensor]]:
    """What the engine multiplies all scales of an input by, float32 [1], by the path of its site,
    where it does: under it the largest input of ``batches`` has the scale 448. With ``gm``, or a
    copy that remembers what was read.

    Raises as ``observe_nodes``.
    """
    if not _sites(gm):
        return gm, {}
    copy = clone_sharing_storage(gm)
    sources = {
        site.path: operands(site.quantize).x for site in _sites(copy) if site.quantize is not None
    }
    observers = {source: ChannelAbsmax(path) for path, source in sources.items()}
    assert batches is not None  # without data such inputs are refused
    read = SizedRecording(read_often(batches))
    observe_nodes(copy, observers, read, label=GLOBAL)
    remember(copy, read, GLOBAL)
    found = {
        node: E4M3_SCALE.global_scale(seen.max_abs.amax().cpu(), E2M1)
        for node, seen in observers.items()
    }
    return copy, {path: reciprocal(found[source]) for path, source in sources.items()}


def read_often(batches: Batches) -> Batches:
    """The batches; in a list where they can be taken once only."""
    given = batches_of(batches)
    return given if isinstance(given, Sized) else list(given)


def _sites(gm: GraphModule) -> list[CodedSite]:
    return [site for site in coded_sites(gm) if fixes_global_scale(site.spec.activation)]


def reciprocal(global_scale: Tensor | None) -> Tensor:
    """float32 [1]: the global scale as the format has it."""
    assert global_scale is not None
    return 1.0 / global_scale.reshape(1)


class EngineInput(nn.Module):
    """float32 [..., K] to what its codes stand for.

    ``fixed``: the global scale of what ``fixed_scales`` knows. ``reached``: what the engine's
    linear was last given, [..., K]: of an expert the tokens that are routed to it, where all are
    given here. ``shares_a_scale`` and ``routed`` say, once it has run, whether tokens did and were.
    """

    def __init__(self, site: CodedSite, fixed: Tensor | None) -> None:
        super().__init__()
        assert site.spec.activation is not None
        self.spec = site.spec.activation.tensor
        self.static = site.static_input()
        self.fixed = fixed
        self.shares_a_scale = self.routed = False
        self.reached: Tensor | None = None

    @property
    def of_integers(self) -> bool:
        return isinstance(self.spec.grid, IntegerGrid)

    def forward(self, x: Tensor) -> Tensor:
        size = self.spec.group_size
        if size is not None:
            groups = x.unflatten(-1, (-1, size))
            return self._rounded(groups, self._group_scale(groups), None).flatten(-2)
        return self._rounded(x, *(self._range(x) if self.static is None else self.static))

    def _rounded(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        steps = x / scale
        if not self.of_integers:
            return self.spec.grid.nearest_(steps) * scale
        if zero_point is not None:
            steps = steps + zero_point.to(x.dtype)
        codes = torch.round(torch.clamp(steps, _LOWEST, _HIGHEST))
        if zero_point is not None:
            codes = codes - zero_point.to(x.dtype)
        return codes * scale

    def _group_scale(self, groups: Tensor) -> Tensor:
        """[..., G, 1] of groups [..., G, g]."""
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        largest = torch.maximum(low.clamp(max=0).abs(), high.clamp(min=0).abs())
        if isinstance(self.spec.scale, PowerScale):
            return _power(largest, self.spec.grid.top_exponent)
        if self.fixed is None:
            return _positive(largest / self._reach)
        scale = E4M3.nearest_(self.fixed * (largest / self._reach))
        return torch.where(scale == 0, _ZERO_E4M3, scale) / self.fixed

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Dynamic scale and zero point. A "token" is what shares the first two dimensions: of an
        input [tokens, K] that is each element, and the engine takes the whole instead."""
        token = self.spec.granularity == "token"
        axes = tuple(range(2, x.dim())) if token else ()
        self.shares_a_scale |= token and not axes
        if not axes and self.reached is not None and 0 < self.reached.numel() < x.numel():
            x, self.routed = self.reached, True
        if axes:
            low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        else:
            low, high = x.min(), x.max()
        low, high = low.clamp(max=0), high.clamp(min=0)
        if not self.spec.grid.has_zero_point:
            return _positive(torch.maximum(low.abs(), high.abs()) / self._reach), None
        scale = (high - low) / 255.0
        zero_point = torch.round((_LOWEST - low / scale).clamp(_LOWEST, _HIGHEST))
        return _positive(scale), zero_point

    @property
    def _reach(self) -> float:
        return 127.5 if self.of_integers else self.spec.grid.highest

    def differences(self) -> Iterator[str]:
        """How the codes are not the graph's, in words."""
        dynamic = self.static is None
        if self.of_integers and not self.spec.grid.has_zero_point:
            yield "symmetric codes reach -128 there, -127 here"
            if dynamic:
                yield "a dynamic scale is absmax/127.5 there, absmax/127 here"
        elif self.of_integers:
            yield "a code is rounded after its zero point is added there, before it here"
        if self.routed:
            yield "an expert's range is of the tokens that are routed to it there, of all here"
        if self.shares_a_scale:
            yield "an input [tokens, K] has one scale there, one a token here"
        if isinstance(self.spec.scale, PowerScale):
            yield from self._of_powers(self.spec.scale.rule)
        if self.fixed is not None:
            yield "an input's global scale is fixed there, by calibration, and each call's own here"

    def _of_powers(self, rule: str) -> Iterator[str]:
        near = "even" if self.spec.grid == E2M1 else "rceil"
        if rule != near:
            yield (
                "an input's power of two is its group's largest rounded to one bit of mantissa "
                f"there, and follows the rule {rule} here, of which {near} is the nearest"
            )
        elif near == "rceil":
            yield "a group's largest of 1.75 powers of two takes the next scale there"


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def _power(largest: Tensor, top_exponent: int) -> Tensor:
    """The power of two of ``largest``, float32, rounded to E2M1's mantissa whatever the grid is."""
    bits = largest.contiguous().view(torch.int32) + (1 << 21)
    rounded = (bits & 0x7F800000).view(torch.float32)
    exponent = _BIAS + torch.floor(torch.log2(rounded)) - top_exponent
    return 2.0 ** (exponent.clamp(0, 255).round() - _BIAS)
