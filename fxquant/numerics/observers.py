"""Mergeable statistics of activations, as modules that stand in an observed graph.

An observer is called with the observed tensor and the attention mask, keeps constant memory, and
merges exactly: counts add, extremes take the maximum. Padding (mask 0) does not count. Observer
nodes have no users, so the graph around them computes what it did before.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxquant.errors import NonFiniteError

BINS = 2**16
Reduction = Literal["sum", "min", "max"]
_COMBINE: Mapping[Reduction, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": operator.add,
    "min": torch.minimum,
    "max": torch.maximum,
}


def attended(x: Tensor, attention_mask: Tensor) -> Tensor:
    """The rows ``[tokens, C]`` of ``x`` [batch, length, ..., C] or [batch * length, C] under mask.

    ``attention_mask`` is [batch, length]; rows where it is 0 are left out.
    """
    rows = x.reshape(attention_mask.numel(), -1)
    keep = attention_mask.reshape(-1).to(torch.bool)
    return rows if bool(keep.all()) else rows[keep]


class Observer(nn.Module):
    """Base: selects attended rows, refuses NaN and infinity, counts tokens.

    Args:
        site: where it stands; errors name it.
    """

    # How each buffer merges with that of another observer.
    reductions: ClassVar[Mapping[str, Reduction]] = {"tokens": "sum"}

    # Keeps torch.fx's dead code elimination from dropping a node without users.
    _is_impure = True

    tokens: Tensor

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, x: Tensor, attention_mask: Tensor) -> None:
        rows = attended(x, attention_mask)
        if rows.numel() == 0:
            return
        low, high = torch.aminmax(rows)
        if not (bool(torch.isfinite(low)) and bool(torch.isfinite(high))):
            raise NonFiniteError(
                f"{self.site}: its input holds NaN or infinite activations during calibration; "
                "the model overflows its dtype or its weights are damaged"
            )
        self.update(rows, low, high)
        self.tokens += rows.shape[0]

    def update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Add ``rows`` [tokens, C], whose extremes are ``low`` and ``high`` (0-dim)."""
        raise NotImplementedError

    def merge(self, other: Observer) -> None:
        """Add what ``other`` of the same kind has seen, exactly."""
        if type(other) is not type(self):
            raise TypeError(f"cannot merge {type(other).__name__} into {type(self).__name__}")
        for name, value in other.named_buffers():
            mine = self.get_buffer(name)
            if mine.numel() == 0:
                self.register_buffer(name, value.clone())
            elif value.numel():
                mine.copy_(_COMBINE[self.reductions[name]](mine, value))


class HistogramObserver(Observer):
    """Counts over float bit patterns: the sign and the top 15 bits of float32, as in bfloat16.

    No range to guess and no re-binning: bin b holds the values whose upper 16 bits are b, so two
    histograms add bin by bin. Relative bin width is 1/128; the exact minimum and maximum stand
    beside the counts. 65,536 int64 counters.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {
        **Observer.reductions,
        "counts": "sum",
        "min_value": "min",
        "max_value": "max",
    }

    counts: Tensor
    min_value: Tensor
    max_value: Tensor

    def __init__(self, site: str) -> None:
        super().__init__(site)
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.int64))
        self.register_buffer("min_value", torch.tensor(float("inf"), dtype=torch.float32))
        self.register_buffer("max_value", torch.tensor(float("-inf"), dtype=torch.float32))

    def update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        bits = rows.to(torch.float32).reshape(-1).view(torch.int32) >> 16
        self.counts += torch.bincount(bits.bitwise_and_(0xFFFF), minlength=BINS)
        self.min_value.copy_(torch.minimum(self.min_value, low.to(torch.float32)))
        self.max_value.copy_(torch.maximum(self.max_value, high.to(torch.float32)))


class ChannelAbsmax(Observer):
    """max|x| of each channel: float32 [C], empty until something is seen."""

    reductions: ClassVar[Mapping[str, Reduction]] = {**Observer.reductions, "max_abs": "max"}

    max_abs: Tensor

    def __init__(self, site: str) -> None:
        super().__init__(site)
        self.register_buffer("max_abs", torch.empty(0, dtype=torch.float32))

    def update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        seen = rows.abs().amax(0).to(torch.float32)
        self.max_abs = torch.maximum(self.max_abs, seen) if self.max_abs.numel() else seen
