"""Run by torchrun in test_distributed: merged observers equal one that saw everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch

from fxquant.numerics.observers import ChannelAbsmax, HistogramObserver, Observer, Reduction
from fxquant.run.distributed import complete, merge_observers, rank, session, shard, world_size


class FloatSum(Observer):
    """What may not be merged: the order of the processes would matter."""

    reductions: ClassVar[Mapping[str, Reduction]] = {**Observer.reductions, "total": "sum"}

    def __init__(self, site: str) -> None:
        super().__init__(site)
        self.register_buffer("total", torch.zeros(3))


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    # Two batches for three processes: one has seen nothing.
    batches = [torch.randn(2, 5, 7, generator=generator) for _ in range(2)]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for kind in (HistogramObserver, ChannelAbsmax):
        alone, shared = kind("site"), kind("site")
        for batch in batches:
            alone(batch, mask)
        for _, batch in shard(batches):
            shared(batch, mask)
        merge_observers([shared])
        for name, value in alone.named_buffers():
            assert torch.equal(value, shared.get_buffer(name)), (kind.__name__, name)
    with pytest.raises(TypeError, match="float sum"):
        merge_observers([FloatSum("site")])
    rows = torch.zeros(5, 2)
    for index, row in shard(torch.arange(10.0).view(5, 2)):
        rows[index] = row
    assert torch.equal(complete(rows), torch.arange(10.0).view(5, 2))
    print(f"process {rank()} of {world_size()} agrees")


if __name__ == "__main__":
    with session("cpu"):
        main()
