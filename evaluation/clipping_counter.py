"""What a graph's activation quantizers clip on a batch, counted beside the run on its device."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.errors import NonFiniteError
from fxquant.formats.table import grid_named
from fxquant.ir.graph import is_op, source_of, tag
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.numerics.clipping import (
    beyond_grid,
    clipped_codes,
    count_clipped,
    unclipped_range,
)

_QUANTIZE = (
    *(OPS.quantize.default, OPS.quantize_to.default),
    *(OPS.quantize_static.default, OPS.quantize_rows.default),
)


@dataclass(frozen=True)
class Quantizers:
    """The nodes of a graph that make codes of activations, with their operands, and which values to
    keep until when.

    ``static_ends``: what each static one lets through, worked out when it is first met.
    """

    calls: Mapping[Node, Any]
    kept_until: Mapping[Node, Node]
    static_ends: dict[Node, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, gm: GraphModule) -> Quantizers:
        calls = {n: operands(n) for n in gm.graph.nodes if n.target in _QUANTIZE}
        return cls(calls, {used: node for node in calls for used in node.all_input_nodes})

    def read(self, counts: Tensor, sizes: Sequence[int]) -> int:
        """Elements clipped, of a ``ClippingCounter``'s ``on_device`` and ``sizes``: one wait.

        Raises NonFiniteError that names the first site whose input holds NaN or infinity.
        """
        if not self.calls:
            return 0
        clipped, finite, first = counts.tolist()
        if not finite:
            seen = zip(self.calls, accumulate(sizes), strict=True)
            node = next(node for node, end in seen if first < end)
            raise NonFiniteError(
                f"{tag(node).site}: its input holds NaN or infinite activations, which have no "
                "code; the model overflows its dtype here"
            )
        return int(clipped)


class ClippingCounter:
    """Sees the values of one batch's run and counts the elements that are clipped.

    Nothing is quantized twice, and nothing is read from the device: ``Quantizers.read`` does that,
    once, with what ``on_device`` holds. A dynamic symmetric range holds its input: there is nothing
    to count. A range that holds an element that is not
    finite is not finite itself, so only static quantizers' inputs are looked through for those.
    """

    def __init__(self, quantizers: Quantizers) -> None:
        self._quantizers = quantizers
        self._values: dict[Node, Any] = {}
        # Of each quantizer in turn, what is not finite where its input is not.
        self._ends: list[Tensor] = []
        self._clipped: list[Tensor] = []
        self._total = 0

    def __call__(self, node: Node, value: Any) -> Any:
        if node in self._quantizers.kept_until:
            self._values[node] = value
        if node in self._quantizers.calls:
            self._see(node, value)
            for used in node.all_input_nodes:
                if self._quantizers.kept_until[used] is node:
                    del self._values[used]
        return value

    def _see(self, node: Node, value: Any) -> None:
        call = self._quantizers.calls[node]
        if is_op(node, OPS.quantize_to.default):
            self._see_grid(call)
            return
        x = self._values[call.x]
        self._total += x.numel()
        if is_op(node, OPS.quantize_rows.default):
            _, scale, zero_point, _ = value
            self._see_dynamic(x, scale, zero_point, call)
            return
        scale, zero_point = (self._values.get(each, each) for each in (call.scale, call.zero_point))
        dynamic = _dynamic_range(call.scale)
        if dynamic is not None:
            self._see_dynamic(x, scale, zero_point, dynamic)
            return
        ends = self._quantizers.static_ends.get(node)
        if ends is None:
            ends = unclipped_range(scale, zero_point, call.qmin, call.qmax)
            self._quantizers.static_ends[node] = ends
        self._see_static(x, *ends)

    def _see_dynamic(self, x: Tensor, scale: Tensor, zero_point: Any, chosen: Any) -> None:
        self._ends.append(scale)
        if not chosen.symmetric:
            self._clipped.append(clipped_codes(x, scale, zero_point, chosen.qmin, chosen.qmax))

    def _see_grid(self, call: Any) -> None:
        """Of another grid, whose groups may be clipped by a scale that was rounded."""
        x, scale = (self._values.get(each, each) for each in (call.x, call.scale))
        self._total += x.numel()
        static = call.scale.op == "get_attr"
        if static:
            self._ends.append(torch.stack((x.amin(-1), x.amax(-1))))
        else:
            self._ends.append(scale.amax(-1) if scale.dim() else scale)
        grid, size = grid_named(call.grid), call.group_size or None
        self._clipped.append(beyond_grid(x, scale, grid, size))

    def _see_static(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        # Two vectorized reductions read twice, and are still faster than one aminmax.
        lowest, highest = x.amin(-1), x.amax(-1)
        self._ends.append(torch.stack((lowest, highest)))
        if x.device.type == "cpu":
            # Reading a device waits for all that is queued there; the CPU has nothing queued.
            x = x[(lowest < low) | (highest > high)]
        if x.numel():
            self._clipped.append(count_clipped(x, low, high))

    @property
    def total(self) -> int:
        """Elements quantized."""
        return self._total

    @property
    def sizes(self) -> list[int]:
        """How many numbers are looked at for each site's input, whether they are finite."""
        return [each.numel() for each in self._ends]

    def on_device(self, like: Tensor) -> Tensor:
        """int64 [3] on like's device: elements clipped; 1 if all inputs are finite; the first
        of their ``sizes`` numbers that is least so."""
        if not self._ends:  # made there: a copy from the host waits, and cannot be captured
            return (torch.arange(3, device=like.device) == 1).to(torch.int64)
        finite = torch.isfinite(torch.cat([each.flatten() for each in self._ends]))
        first = finite.to(torch.uint8).argmin()
        clipped = torch.stack((torch.zeros_like(first), *self._clipped)).sum()
        return torch.stack((clipped, finite.all().to(torch.int64), first))


def _dynamic_range(scale: Node) -> Any:
    """The operands of the choose_qparams that computes this scale; None for a static one."""
    if not is_op(scale, operator.getitem):
        return None
    source = source_of(scale)
    return operands(source) if is_op(source, OPS.choose_qparams.default) else None
