"""The speed table: what was measured, in words, beside its goals, a column for each machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from fxquant.ir.counted import counted


@dataclass(frozen=True)
class Ratio:
    """A line of the table: a key of the results' ratios, in words; ``goal``: at most how much it
    was to be where integer GEMMs go through the processor's int8 instructions, ``plain``: where
    they do not, None for the same."""

    key: str
    label: str
    goal: float | None = None
    plain: float | None = None


# What GEMMs are fast by, strongest first.
_STRENGTH: Final = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2")
DYNAMIC, STATIC = "w8a8-dynamic-token graph", "w8a8-static:absmax graph"
SPEED: Final = (
    Ratio("float graph", "float graph"),
    Ratio("float graph, compiled blocks", "float graph, its blocks compiled"),
    Ratio(DYNAMIC, "w8a8-dynamic-token, level integer", 0.45, 1.05),
    Ratio(f"{DYNAMIC}, kernels", "the same, level kernels", 0.45, 1.05),
    Ratio(f"{DYNAMIC}, compiled blocks", "the same, its blocks compiled", 0.38, 0.97),
    Ratio(f"bfloat16: {DYNAMIC}", "in a bfloat16 model, to it: level integer", 0.75),
    Ratio(f"bfloat16: {DYNAMIC}, kernels", "in a bfloat16 model, to it: level kernels", 0.75),
    Ratio(
        f"bfloat16: {DYNAMIC}, compiled blocks", "in a bfloat16 model, to it: blocks compiled", 0.75
    ),
    Ratio(STATIC, "w8a8-static:absmax, level integer"),
    Ratio(f"{STATIC}, kernels", "the same, level kernels"),
    Ratio("fake-quant module swap", "float fake-quant module swap, not exact"),
    Ratio("w8 graph", "weights alone: w8, level integer"),
    Ratio("w8 graph, kernels", "the same, level kernels"),
    Ratio("w4-g128 graph", "weights alone: w4-g128, level integer"),
    Ratio("w4-g128 graph, kernels", "the same, level kernels"),
    Ratio("evaluate / forwards, fp", "`evaluate` over its graph's forwards: fp", 1.05),
    *(
        Ratio(
            f"evaluate / forwards, {scheme}",
            f"`evaluate` over its graph's forwards: {scheme}",
            goal,
        )
        for scheme, goal in (
            ("w8a8-dynamic-token", 1.05),
            ("w8a8-dynamic-token-asym", None),
            ("w8a8-static:absmax", 1.05),
        )
    ),
    Ratio("convert w8a8-dynamic-token / forward", "`convert` without calibration", 6),
    Ratio("calibration per window / forward", "calibration, per window", 1.4),
    Ratio(
        "peak memory of convert / (float + codes)",
        "peak memory of `convert`, over float model + codes",
        1.15,
    ),
)
# Of the results' seconds, those that are told, and at most how many they were to be.
SECONDS: Final[dict[str, float | None]] = {
    "one forward": None,
    "first call of compiled blocks, the longest": 10,
}


def speed_rows(machines: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The head, and a row for each ratio that some machine has."""
    rows = [("measured against one eager float forward", *(column(data) for data in machines))]
    for line in SPEED:
        if any(line.key in data["ratios"] for data in machines):
            rows.append((line.label, *(_cell(line, data) for data in machines)))
    return rows


def _cell(line: Ratio, data: dict[str, Any]) -> str:
    if line.key not in data["ratios"]:
        return ""
    ratio = data["ratios"][line.key]
    goal = line.goal if data["int8"] or line.plain is None else line.plain
    shown = f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}"
    return shown + _judged(ratio, goal)


def _judged(found: float, goal: float | None) -> str:
    if goal is None:
        return ""
    return f" ({goal:g}{': missed' if found > goal else ''})"


def column(data: dict[str, Any]) -> str:
    """A machine's name: its processor, its strongest instructions, what it was held to."""
    held = " held to AVX2" if data["held"] else ""
    strongest = next((name for name in _STRENGTH if name in data["features"]), "no AVX2")
    threads = counted(data["threads"], "thread")
    return f"{data['processor']}, {strongest.upper().replace('_', '-')}, {threads}{held}"


def measured(data: dict[str, Any]) -> str:
    """What was measured, and how."""
    seconds = ", ".join(
        f"{name} {data['seconds'][name]:.2f} s{_judged(data['seconds'][name], goal)}"
        for name, goal in SECONDS.items()
        if name in data["seconds"]
    )
    parts = [
        f"{data['model']} ({data['revision'][:23]}), windows of {data['length']} tokens",
        counted(data["rounds"], "round"),
        seconds,
        f"features {' '.join(data['features']) or 'none'}",
        f"integer GEMMs by {'int8 instructions' if data['int8'] else 'fp32'}",
        f"{data['clock']} seconds",
    ]
    if data["held"]:
        parts.append(" ".join(f"{name}={value}" for name, value in data["held"].items()))
    return ", ".join(parts)
