"""README's table of benchmarks/cuda.json: forwards and the main job on CUDA, and what made them."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from fxquant.ir.calibration import version_words

_LEVELS = ("integer", "kernels", "kernels-inexact")
_JOBS = (*_LEVELS, "replayed")


def forwards_table(result: dict[str, Any]) -> str:
    """The forwards' ratios to eager, a row for each scheme and batch; peers behind them."""
    rows: list[tuple[object, ...]] = []
    for found in result["figures"].values():
        for row in found if isinstance(found, list) else ():
            levels = row["ratio"]
            shape = f"{row['batch']}×{row['length']}"
            same = {True: "yes", False: "NO"}.get(row.get("same bits"), "")
            figures = map(_number, map(levels.get, (*_LEVELS, "peer")))
            rows.append((row["scheme"], shape, *figures, same))
    head = ("scheme", "batch × length", *_LEVELS, "itself", "same bits")
    align = ("left", "left", "right", "right", "right", "right", "left")
    return tabulate(rows, head, tablefmt="github", disable_numparse=True, colalign=align)


def jobs_table(result: dict[str, Any]) -> str:
    """Seconds of ``fxquant evaluate`` on the real model; "" where none was measured."""
    rows = [
        (found["scheme"], *(_number(found.get(key, {}).get("seconds")) for key in _JOBS))
        for found in result["figures"].values()
        if isinstance(found, dict) and "scheme" in found
    ]
    head = ("evaluate, seconds", *_LEVELS, "the last of them, replayed")
    align = ("left", "right", "right", "right", "right")
    return (
        tabulate(rows, head, tablefmt="github", disable_numparse=True, colalign=align)
        if rows
        else ""
    )


def page_table(result: dict[str, Any]) -> str:
    """All of it, with what made it and what was skipped."""
    dry = "A dry run on the CPU: no figures of a GPU. " if result["dry_run"] else ""
    model = "a tiny OPT" if result["dry_run"] else "OPT-1.3B's shapes"
    made = (
        f"{dry}Ratios of medians of {result['rounds']} to Hugging Face's eager {result['dtype']} "
        f"forward, {model} with random weights, and the main job on {result['model']}; "
        f"{result['device']}; {version_words(result['versions'])}; `python -m benchmarks.cuda`"
    )
    skipped = [f"{name}: {why}" for name, why in result["skipped"].items()]
    said = [f"Skipped: {'; '.join(skipped)}"] if skipped else []
    parts = (forwards_table(result), jobs_table(result), made, *said)
    return "\n\n".join(part for part in parts if part)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
