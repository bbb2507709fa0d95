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
# As explain names them: sites that read one input are of one kind.
GROUPS = {
    **dict.fromkeys(KINDS[:3], "self_attn.q_proj/k_proj/v_proj"),
    "o_proj": "self_attn.o_proj",
    **dict.fromkeys(KINDS[4:6], "mlp.gate_proj/up_proj"),
    "down_proj": "mlp.down_proj",
}
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
    "architecture": "llama 12x576",
    "dataset": "builtin",
    "text_hash": "sha256:" + "a7" * 32,
    "windows_hash": "sha256:" + "b3" * 32,
    "protocol": {
        "dataset": "builtin",
        "split": "evaluation topics",
        "join": "",
        "selection": "all documents",
        "tokenizer": "fast GPT2TokenizerFast",
        "bos": "none",
        "length": 512,
        "stride": 512,
        "windows": 8,
        "complete": False,
    },
    "windows": 8,
    "length": 512,
    "calibration": "16 windows of 512 from builtin (calibration topics, grid)",
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
    """Fill ``folder`` with results.json, results.jsonl, explanation.json and inspect.json."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(scheme, delta, rng) for scheme, delta in LADDER.items()]
    _write(folder / "results.json", {"complete": True, "provenance": PROVENANCE, "rows": rows})
    _write(folder / "explanation.json", explanation(rng))
    _write(folder / "inspect.json", inspection(rng))
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sweep(rng)))
    return folder


def sweep(rng: random.Random) -> list[dict[str, Any]]:
    """Two models, three seeds, and a cell that failed."""
    lines = []
    for model, factor in (("package:example", 1.0), ("package:other", 0.2)):
        for seed in range(3):
            for scheme, delta in LADDER.items():
                drawn = "static" in scheme  # calibrated; the others have one cell for all seeds
                if not drawn and seed > 0:
                    continue
                row = _row(scheme, delta * factor * rng.uniform(0.8, 1.2), rng)
                provenance = {**PROVENANCE, "model": model, "seed": seed}
                lines.append(_cell(model, scheme, seed if drawn else None, row, provenance, None))
    error = f"blocks.0: group 128 does not divide 96 {HOSTILE}"
    return [*lines, _cell("package:other", "w3-g128", None, None, None, error)]


def _cell(
    model: str,
    scheme: str,
    seed: int | None,
    figures: dict[str, Any] | None,
    provenance: dict[str, Any] | None,
    error: str | None,
) -> dict[str, Any]:
    return {
        "format": 1,
        "fingerprint": f"{model}/{scheme}/{seed}",
        "model": model,
        "scheme": scheme,
        "dataset": "builtin",
        "seed": seed,
        "protocol": None if provenance is None else provenance["protocol"],
        "figures": figures,
        "provenance": provenance,
        "error": error,
    }


def _row(scheme: str, delta: float, rng: random.Random) -> dict[str, Any]:
    loss = 2.6641 + delta
    # Windows differ by a fifth of delta, up and down in turn: 8 of them have a standard error of
    # delta / 5 / sqrt(7).
    nll = [511 * (2.6641 + delta * (1 + (-1) ** window / 5)) for window in range(8)]
    static = "static" in scheme
    return {
        "scheme": scheme,
        "loss": loss,
        "perplexity": math.exp(loss),
        "delta_loss": delta,
        "delta_error": None if scheme == "fp" else abs(delta) / 5 / math.sqrt(7),
        "bits_per_weight": {"fp": 32.0, "w4-g128": 4.13}.get(scheme, 8.05),
        "share_clipped": rng.uniform(1e-5, 2e-3) if static else None,
        "convert_seconds": rng.uniform(1, 9),
        "evaluate_seconds": rng.uniform(5, 20),
        "left_in_float": ["lm_head: left in float unless the scheme says head", "embeddings: same"],
        "window_nll": nll,
        "window_tokens": [511] * 8,
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
    kinds = [
        _group(kind, [s for s in listed if s["kind"] == kind])
        for kind in dict.fromkeys(GROUPS.values())
    ]
    blocks = [
        _group(f"model.layers.{b}", [s for s in listed if s["block"] == f"model.layers.{b}"])
        for b in range(BLOCKS)
    ]
    for kind in kinds:
        share = kind["sums"]["in_order"]
        kind["causes"] = {
            "weights": share * 0.02,
            "clipping": share * rng.uniform(0.5, 0.9),
            "rounding": share * rng.uniform(0.1, 0.3),
        }
    culprit = f"model.layers.2.mlp.{KINDS[-1]}"
    choices = {"float": 0.08, "16-bit": 0.1, "per token": 0.22, "mse": 0.37, "absmax": 0.4}
    return {
        "model": "package:example",
        "scheme": "w8a8-static",
        "sites_pattern": None,
        "windows": [8, 512],
        "loss_unrepaired": 2.6641,
        "loss_float": 2.6641,
        "loss_quantized": 2.6641 + delta,
        "delta_loss": delta,
        "causes": {"weights": 0.002, "clipping": delta - 0.202, "rounding": 0.2},
        "sites": listed,
        "kinds": kinds,
        "blocks": blocks,
        "path": {"estimate": delta * 1.01, "residual": 0.01 * delta, "points": 8, "refused": None},
        "counterfactuals": [
            {
                "site": culprit,
                "choice": name,
                "delta_loss": delta * left,
                "recovered": delta * (1 - left),
            }
            for name, left in choices.items()
        ],
        "recovery": [
            {"fixed": fixed, "delta_loss": delta * (0.1 + 0.9 * 0.25**step)}
            for step, fixed in enumerate((0, 1, 2, 4, 8, 16, 32, 64))
        ],
        "validation": [
            {
                "figure": "path",
                "against": "in_order",
                "rank_correlation": 0.93,
                "top": 0.875,
                "error": 0.06,
            },
            {
                "figure": "sqnr",
                "against": "in_order",
                "rank_correlation": 0.41,
                "top": 0.25,
                "error": None,
            },
        ],
        "ranking": "in_order",
        "forward_seconds": 0.81,
        "costs": {"in_order": {"forwards": 101.2, "seconds": 82.1, "measured_forwards": 101.4}},
        "notes": [],
    }


def _group(name: str, members: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {key: sum(site[key] for site in members) for key in ("in_order", "rescue")}
    return {"name": name, "sites": len(members), "sums": sums, "measured": {}, "causes": None}


def _explained(path: str, kind: str, block: int, rng: random.Random) -> dict[str, Any]:
    size = 10 ** rng.uniform(-4, -2) * (3 if kind == "down_proj" else 1)
    size = 1.9 if (kind, block) == ("down_proj", 2) else size
    effect = size if size > 1 or rng.random() < 0.85 else -size / 10
    return {
        "site": path,
        "kind": GROUPS[kind],
        "block": f"model.layers.{block}",
        "path": {"weights": effect * 0.01, "clipping": effect * 0.8, "rounding": effect * 0.19},
        "causes": None,
        "energy": {
            "weights": rng.uniform(0, 1e-3),
            "clipping": rng.uniform(0, 1e-1),
            "rounding": rng.uniform(0, 1e-2),
        },
        "rounding_floor": rng.uniform(0, 1e-3),
        "range_mismatch": rng.uniform(0, 1e-3),
        "sqnr_db": rng.uniform(12, 45),
        "mse": rng.uniform(0, 1e-2),
        "share_clipped": rng.uniform(0, 0.002),
        "share_flushed": rng.uniform(0, 0.3),
        "worst_channels": [_channel(rng) for _ in range(2)],
        "worst_tokens": [_token(rng)],
        "token_groups": {"first": rng.uniform(0, 1), "rest": rng.uniform(0, 1)},
        "in_order": effect,
        "rescue": effect * rng.uniform(0.5, 1.2),
        "cause": "clipping",
    }


def _channel(rng: random.Random) -> dict[str, Any]:
    peak = rng.uniform(1, 900)
    return {
        "channel": rng.randrange(576),
        "share": rng.uniform(0.05, 0.8),
        "peak": peak,
        "peak_over_median": peak / 2,
        "effect": None,
    }


def _token(rng: random.Random) -> dict[str, Any]:
    return {
        "window": rng.randrange(8),
        "row": 0,
        "position": 0,
        "token_id": rng.randrange(49152),
        "text": f" {HOSTILE}\n",
        "group": "first",
        "share": rng.uniform(0.1, 0.9),
        "effect": 0.01,
    }


def inspection(rng: random.Random) -> dict[str, Any]:
    """Five passes, four with diffs; every site with a histogram and a range inside its values."""
    diff = ["--- before quantize", "+++ after quantize", "@@ model.layers.0.self_attn.q_proj @@"]
    diff += [" x = add(embed, position)", "-q = linear(x, q_proj.weight)"]
    diff += ["+q_x = quantize(x, scale, 0, -127, 127, int8)", f"+q = {HOSTILE}"]
    history = [
        {
            "name": name,
            "spelling": name,
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
        "model": "package:example",
        "scheme": "w8a8-static",
        "level": "integer",
        "parameters": 134515008,
        "bytes_before": [["float32", 538060032]],
        "bytes_after": [["int8", 106168320], ["float32", 113962752]],
        "bits_per_weight": 8.05,
        "history": history,
        "sites": [_inspected(path, rng) for path, _, _ in sites()],
        "left_in_float": [{"path": "lm_head", "reason": "unless the scheme says head"}],
        "notes": [],
    }


def _inspected(path: str, rng: random.Random) -> dict[str, Any]:
    width, bins = rng.uniform(0.5, 2.5), 64
    middles = [-14 + 28 * (index + 0.5) / bins for index in range(bins)]
    counts = [int(1e6 * math.exp(-abs(x) / width) * rng.uniform(0.7, 1.3)) for x in middles]
    reach = width * 5.2
    outside = sum(c for x, c in zip(middles, counts, strict=True) if abs(x) > reach)
    record = {
        "path": path,
        "spec": "w8a8-static",
        "weight_sqnr": rng.uniform(30, 45),
        "scale": reach / 127,
        "zero_point": 0,
        "estimator": "p99.9",
        "low": -reach,
        "high": reach,
        "seen_low": -14.0,
        "seen_high": 14.0,
        "clipped": outside / sum(counts),
        "histogram": counts,
    }
    return {
        "path": path,
        "count": 1,
        "site": {"path": path, "role": "linear", "shape": [576, 576]},
        "spec": "w8a8-static",
        "scales": [rng.uniform(1e-4, 1e-3), rng.uniform(1e-3, 1e-2)],
        "records": [record],
    }


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
