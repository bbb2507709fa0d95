"""What a measurement ran on: the processor, what it and torch's libraries can do, and threads."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any, Final

import torch

from fxquant.numerics.cpu_int8 import exact_int_mm

# Flags of /proc/cpuinfo that decide which kernels torch's libraries take.
FEATURES: Final = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16"),
)
# What holds ATen, oneDNN and MKL to AVX2 on a processor that can do more. It is read when a process
# starts. The processor stays what it is: its clock, its caches, its ports.
HELD_TO_AVX2: Final = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def processor() -> str:
    """Its name as the system has it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def features() -> list[str]:
    """Those of FEATURES that the processor has (Linux)."""
    flags = _cpuinfo().get("flags", "").split()
    return [name for name in FEATURES if name in flags]


def description() -> dict[str, Any]:
    """What goes beside figures: also what the environment took away, and whether integer GEMMs go
    through the processor's int8 instructions, which the kernel itself is asked."""
    return {
        "processor": processor(),
        "features": features(),
        "held": {name: os.environ[name] for name in HELD_TO_AVX2 if name in os.environ},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "int8": exact_int_mm(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }


def _cpuinfo() -> dict[str, str]:
    """Of the first processor; empty where the system has no such file."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
