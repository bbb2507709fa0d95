"""The schemes and repairs that docs/repairs_measured.md compares, and the models they run on."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.subjects import small_opt, smollm2


@dataclass(frozen=True)
class Family:
    """One scheme and the repairs that are tried on it; ``explained``: those taken apart."""

    base: str
    repairs: tuple[str, ...]
    explained: tuple[str, ...] = ()


STATIC = Family(
    "w8a8-static:absmax",
    (
        "smooth(alpha=0.5)",
        "smooth(alpha=0.7,where=all)",
        "rotate+smooth(alpha=0.7,where=all)",
        "smooth(alpha=0.8,where=all)",
        "smooth(alpha=0.6,where=all)",
        "smooth(alpha=0.7,where=all)+gptq",
        "smooth(alpha=0.7,where=all)+correct_bias",
        "rotate",
        "split_outliers",
        "smooth(alpha=0.7,where=all)+split_outliers",
        "smooth(alpha=auto,where=all)",
    ),
    explained=("", "smooth(alpha=0.5)", "smooth(alpha=0.7,where=all)", "rotate", "split_outliers"),
)
STATIC_MSE = Family("w8a8-static:mse", ("smooth(alpha=0.7,where=all)",))
STATIC_ASYM = Family(
    "w8a8-static-asym:absmax",
    (
        "smooth(alpha=0.7,where=all)",
        "rotate+smooth(alpha=0.7,where=all)",
        "smooth(alpha=0.6,where=all)",
        "smooth(alpha=0.8,where=all)",
        "smooth(alpha=0.7,where=all)+gptq",
        "smooth(alpha=0.7,where=all)+split_outliers",
        "smooth(alpha=0.7,where=all)+split_outliers+gptq",
        "smooth(alpha=0.7,where=all)+split_outliers(threshold=4)",
        "smooth(alpha=0.7,where=all)+split_outliers(threshold=4)+gptq",
        "smooth(alpha=0.7,where=all)+split_outliers(threshold=4)+correct_bias",
        "smooth(alpha=auto,where=all)",
        "smooth(alpha=0.7,where=all)+correct_bias",
    ),
    explained=(
        "",
        "smooth(alpha=0.7,where=all)",
        "smooth(alpha=0.7,where=all)+split_outliers(threshold=4)",
    ),
)
FOUR_BITS = Family(
    "w4",
    (
        "clip",
        "gptq",
        "gptq(within=block,grid=minmax)",
        "gptq+refine",
        "gptq(order=static)",
        "gptq(order=static)+refine",
    ),
    explained=("", "gptq"),
)
THREE_BITS = Family(
    "w3-g128-asym",
    (
        "clip",
        "awq",
        "awq(balanced=true)",
        "awq(scale=false)",
        "gptq",
        "gptq+refine",
        "awq+gptq",
        "awq(clip=false)+gptq",
        "gptq(order=static)+refine",
    ),
    explained=("", "awq", "gptq"),
)
PER_TENSOR = Family("w4-tensor", ("equalize", "correct_bias"))
ATTENTION = Family("w8a8-dynamic-token", ("attn8", "kv8", "kv4"), explained=("", "attn8"))
FAMILIES = (STATIC, STATIC_MSE, STATIC_ASYM, FOUR_BITS, THREE_BITS, PER_TENSOR, ATTENTION)

# Each family is measured on each.
SUBJECTS = (small_opt(windows=16, length=256, calibration=16), smollm2(8, 512, 8))


def spelled(base: str, repair: str) -> str:
    return f"{base}+{repair}" if repair else base
