"""A results folder with every part that the report reads, of random numbers, seeded.

The shapes are those of evaluation/results.py, the sweep, Explanation.to_dict() and
Inspection.to_dict(); the numbers mean nothing.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCKS = 12
LADDER = {
    "fp": 0.0,
    "w8": 0.0024,
    "w4-g128": 0.31,
    "w8a8-dynamic-token": 0.031,
    "w8a8-dynamic": 0.67,
    "w8a8-static:absmax": 0.8,
    "w8a8-static": 3.83,
}
# What a report must never let out of its quotes.
HOSTILE = "</script><img src=x onerror=alert(1)>"

PROVENANCE: dict[str, Any] = {
    "model": "package:example",
    "revision": "sha256:" + "0f" * 32,
    "dataset": "builtin",
    "text_hash": "sha256:" + "a7" * 32,
    "windows": 8,
    "length": 512,
    "calibration_windows": 16,
    "batch_size": 1,
    "dtype": "float32",
    "device": "cpu",
    "seed": 0,
    "threads": 2,
    "versions": {"fxquant": "0.1.0", "torch": "2.13.0"},
    "command": "fxquant evaluate --model package:example ...",
}


def write_folder(folder: Path, seed: int = 0) -> Path:
    """Fill ``folder`` with results.json, results.jsonl, explain.json and inspect.json."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(scheme, delta, rng) for scheme, delta in LADDER.items()]
    _write(folder / "results.json", {"complete": True, "provenance": PROVENANCE, "rows": rows})
    _write(folder / "explain.json", explanation(rng))
    _write(folder / "inspect.json", inspection(rng))
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sweep(rng)))
    return folder


def sweep(rng: random.Random) -> list[dict[str, Any]]:
    """Two models, three seeds, and a cell that failed."""
    lines = []
    for model, factor in (("package:example", 1.0), ("package:other", 0.2)):
        for seed in range(3):
            for scheme, delta in LADDER.items():
                row = _row(scheme, delta * factor * rng.uniform(0.8, 1.2), rng)
                provenance = {**PROVENANCE, "model": model, "seed": seed}
                lines.append({**row, "model": model, "seed": seed, "provenance": provenance})
    failed = {"model": "package:other", "scheme": "w3-g128", "seed": 0}
    provenance = {**PROVENANCE, "model": "package:other", "seed": 0}
    error = f"blocks.0: group 128 does not divide 96 {HOSTILE}"
    return [*lines, {**failed, "error": error, "provenance": provenance}]


def _row(scheme: str, delta: float, rng: random.Random) -> dict[str, Any]:
    loss = 2.6641 + delta
    static = "static" in scheme
    return {
        "scheme": scheme,
        "loss": loss,
        "perplexity": math.exp(loss),
        "delta_loss": delta,
        "standard_error": abs(delta) * 0.08 + (0.0 if scheme == "fp" else 0.0004),
        "bits_per_weight": {"fp": 32.0, "w4-g128": 4.13}.get(scheme, 8.05),
        "share_clipped": rng.uniform(1e-5, 2e-3) if static else None,
        "convert_seconds": rng.uniform(1, 9),
        "evaluate_seconds": rng.uniform(5, 20),
        "left_in_float": ["lm_head: left in float unless the scheme says head", "embeddings: same"],
    }


def sites() -> list[tuple[str, str, int]]:
    """(path, kind, block) in graph order."""
    parts = {kind: "mlp" if kind in KINDS[4:] else "self_attn" for kind in KINDS}
    return [
        (f"model.layers.{block}.{parts[kind]}.{kind}", kind, block)
        for block in range(BLOCKS)
        for kind in KINDS
    ]


def explanation(rng: random.Random) -> dict[str, Any]:
    """in_order sums to delta_loss, causes too; down_proj of block 2 is the culprit."""
    listed = [_explained(path, kind, block, rng) for path, kind, block in sites()]
    delta = sum(site["in_order"] for site in listed)
    kinds = {
        kind: {
            "in_order": sum(site["in_order"] for site in listed if site["kind"] == kind),
            "causes": {
                "weights": rng.uniform(-0.01, 0.02),
                "clipping": rng.uniform(0.1, 0.5),
                "rounding": rng.uniform(0.01, 0.1),
            },
        }
        for kind in KINDS
    }
    blocks = {
        str(block): {"in_order": sum(s["in_order"] for s in listed if s["block"] == block)}
        for block in range(BLOCKS)
    }
    return {
        "model": "package:example",
        "scheme": "w8a8-static",
        "loss_float": 2.6641,
        "loss_quantized": 2.6641 + delta,
        "delta_loss": delta,
        "causes": {"weights": 0.002, "clipping": delta - 0.202, "rounding": 0.2},
        "sites": listed,
        "kinds": kinds,
        "blocks": blocks,
        "validation": [
            {"estimate": "path", "against": "in_order", "rank_correlation": 0.93, "residual": 0.02},
            {"estimate": "sqnr", "against": "in_order", "rank_correlation": 0.41, "residual": None},
        ],
        "counterfactuals": [
            {"site": sites()[20][0], "choice": choice, "delta_loss": delta * left}
            for choice, left in (("a16", 0.1), ("per token", 0.22), ("absmax", 0.4), ("mse", 0.37))
        ],
        "recovery": [
            {"sites": count, "delta_loss": delta * 0.72**step}
            for step, count in enumerate((1, 2, 4, 8, 16, 32), 1)
        ],
        "provenance": {**PROVENANCE, "forwards": 118.4},
    }


def _explained(path: str, kind: str, block: int, rng: random.Random) -> dict[str, Any]:
    size = 10 ** rng.uniform(-4, -2) * (3 if kind == "down_proj" else 1)
    size = 1.9 if (kind, block) == ("down_proj", 2) else size
    effect = size if rng.random() < 0.85 else -size / 10
    local = {
        "sqnr_db": rng.uniform(12, 45),
        "share_clipped": rng.uniform(0, 0.002),
        "share_flushed": rng.uniform(0, 0.3),
        "energy_weights": rng.uniform(0, 1e-3),
        "energy_clipping": rng.uniform(0, 1e-1),
        "energy_rounding": rng.uniform(0, 1e-2),
    }
    return {
        "site": path,
        "kind": kind,
        "block": block,
        "in_order": effect,
        "rescue": effect * rng.uniform(0.5, 1.2),
        "path": {"weights": effect * 0.01, "clipping": effect * 0.8, "rounding": effect * 0.19},
        "local": local,
        "worst_channels": [
            {"channel": rng.randrange(576), "share": rng.uniform(0.05, 0.8), "cause": "clipping"}
            for _ in range(2)
        ],
        "worst_tokens": [{"token": HOSTILE, "position": 0, "share": rng.uniform(0.1, 0.9)}],
    }


def inspection(rng: random.Random) -> dict[str, Any]:
    """Four passes with diffs, every site with a histogram and a range inside its values."""
    diff = ["--- before quantize", "+++ after quantize", "@@ model.layers.0.self_attn.q_proj @@"]
    diff += [" x = add(embed, position)", "-q = linear(x, q_proj.weight)"]
    diff += ["+q_x = quantize(x, scale, 0, -127, 127, int8)", f"+q = {HOSTILE}"]
    history = [
        {
            "name": name,
            "added": rng.randrange(400),
            "removed": rng.randrange(200),
            "replaced": rng.randrange(100),
            "sites": len(sites()),
            "milliseconds": rng.uniform(3, 900),
            "difference": rng.choice((None, 0.0, 2.1e-7)),
            "diff": "\n".join(diff) if name != "calibrate" else None,
        }
        for name in ("name_sites", "observe", "calibrate", "quantize", "integerize")
    ]
    return {
        "header": {
            "model": "package:example",
            "scheme": "w8a8-static",
            "level": "integer",
            "parameters": 134515008,
            "bits_per_weight": 8.05,
            "bytes": {"before": 538060032, "after": 220131072},
        },
        "history": history,
        "sites": [_inspected(path, rng) for path, _, _ in sites()],
        "left_in_float": [{"path": "lm_head", "reason": "unless the scheme says head"}],
    }


def _inspected(path: str, rng: random.Random) -> dict[str, Any]:
    edges = [-12 + 0.5 * step for step in range(49)]
    width = rng.uniform(0.5, 2.5)
    middles = [edge + 0.25 for edge in edges[:-1]]
    counts = [int(1e6 * math.exp(-abs(x) / width) * rng.uniform(0.7, 1.3)) for x in middles]
    reach = width * 6.9
    return {
        "path": path,
        "shape": [576, 576],
        "weight": "w8",
        "activation": "a8-static",
        "scale": reach / 127,
        "estimator": "p99.9",
        "range": [-reach, reach],
        "share_clipped": sum(c for x, c in zip(middles, counts, strict=True) if abs(x) > reach)
        / sum(counts),
        "sqnr_db": rng.uniform(12, 45),
        "histogram": {"edges": edges, "counts": counts},
    }


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
