"""The study docs/why_static_fails.md: measured, then written from what the run leaves behind.

    python -m benchmarks.why_static_fails            measure, then write page and pictures
    python -m benchmarks.why_static_fails --render   write them from the data that is there

The data are benchmarks/why_static_fails.json, and benchmarks/side_by_side.json, which
benchmarks.side_by_side measures. Finished losses are kept in results/why_static_fails,
so an interrupted run goes on. Needs the ``plots`` extra for the pictures.
"""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

import fxquant
from benchmarks.study_page import page
from benchmarks.subjects import ROOT, Prepared, Subject, small_opt, smollm2
from fxquant.analysis.effects import EFFECTS
from fxquant.analysis.explanation import explain
from fxquant.evaluation.data import Source, load_text
from fxquant.evaluation.models import versions
from fxquant.formats.integer import integer
from fxquant.ir.counted import counted
from fxquant.ir.graph import info, site_outputs, source_of
from fxquant.numerics.ranges import distribution, estimate_range
from fxquant.passes.observe import observers
from fxquant.schemes.specs import Estimator, TensorSpec

DATA = ROOT / "benchmarks" / "why_static_fails.json"
BESIDE = ROOT / "benchmarks" / "side_by_side.json"
PAGE = ROOT / "docs" / "why_static_fails.md"
KEPT = ROOT / "results" / "why_static_fails"
CAUSES = ("causes", "causes:kinds")
ALL = (*EFFECTS, *CAUSES, "path", "first_order")
SHORT = ("alone", *CAUSES, "path", "first_order")
KEEP_DETAILS = 12  # sites whose channels and tokens are kept
ESTIMATORS = {
    "p99": Estimator("percentile", 99),
    "p99.9": Estimator("percentile", 99.9),
    "p99.99": Estimator("percentile", 99.99),
    "absmax": Estimator("absmax"),
}


# The methods that each scheme of a subject is explained with.
SUBJECTS: dict[Subject, dict[str, tuple[str, ...]]] = {
    small_opt(windows=4, length=256, calibration=8): dict.fromkeys(
        (
            "w8",
            "w8a8-dynamic",
            "w8a8-static:absmax",
            "w8a8-static:p99.99",
            "w8a8-static",
            "w8a8-static:p99",
        ),
        ALL,
    ),
    # All exact effects once; elsewhere the one that a chaotic regime leaves clean.
    smollm2(windows=1, length=256, calibration=16): {
        "w8": (*CAUSES, "path"),
        "w8a8-dynamic": ALL,
        "w8a8-static:absmax": SHORT,
        "w8a8-static:p99.99": SHORT,
        "w8a8-static": SHORT,
    },
}


def measure() -> dict[str, Any]:
    """Explain every scheme of every subject."""
    text = load_text("builtin")
    return {
        "text": text.name,
        "text_hash": text.digest,
        "versions": versions(),
        "machine": f"{platform.machine()}, {counted(torch.get_num_threads(), 'thread')}",
        "subjects": [_measure(subject, schemes, text) for subject, schemes in SUBJECTS.items()],
    }


def _measure(subject: Subject, schemes: dict[str, tuple[str, ...]], text: Source) -> dict[str, Any]:
    prepared = subject.prepare(text)
    graph, calibration = prepared.graph, prepared.windows.calibration
    found = {scheme: _explained(prepared, scheme, methods) for scheme, methods in schemes.items()}
    worst = found["w8a8-static"]["sites"][0]["site"]
    return {
        "name": subject.name,
        "model": subject.model,
        "revision": prepared.loaded.revision,
        "windows": subject.windows,
        "length": subject.length,
        "calibration_windows": subject.calibration,
        "blocks": list(info(graph).blocks),
        "planted": [
            f"{each.path}: channel {each.channel}, {each.kind} {each.value:.4g}"
            for each in prepared.planted
        ],
        "schemes": found,
        "histogram": histogram(graph, worst, calibration),
    }


def _explained(prepared: Prepared, scheme: str, methods: tuple[str, ...]) -> dict[str, Any]:
    found = explain(
        prepared.graph,
        scheme,
        calibration=prepared.windows.calibration.split(1),
        data=prepared.windows.evaluation,
        methods=methods,
        worst=3,
        tokenizer=prepared.loaded.tokenizer,
        output=KEPT,
    )
    print(f"{found}\n", flush=True)
    plain = found.to_dict()
    del plain["model"]  # a path of this machine
    by_name = {site["site"]: site for site in plain["sites"]}
    plain["sites"] = [by_name[each.site] for each in found.worst]
    for site in plain["sites"][KEEP_DETAILS:]:
        for name in ("worst_channels", "worst_tokens", "token_groups"):
            del site[name]
    rounded = _rounded(plain)
    assert isinstance(rounded, dict)
    return rounded


def _rounded(value: Any) -> Any:
    """Six digits are more than the figures can carry, and half the file."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def histogram(graph: GraphModule, site: str, calibration: Tensor) -> dict[str, Any]:
    """Counts of |x| at a site's input over the calibration windows, in bins of a quarter octave,
    and the limits that the estimators give."""
    observed = fxquant.convert(
        graph, "w8a8-static", calibration=calibration.split(1), level="observed"
    )
    node = next(node for each, node in site_outputs(observed) if each.path == site)
    observer = observers(observed)[source_of(node)]
    seen = distribution(observer).magnitude()
    centres = ((seen.lower + seen.upper) / 2).clamp(min=2.0**-12)
    bins = (centres.log2() * 4).floor().to(torch.int64)
    first = int(bins.min())
    counts = torch.zeros(int(bins.max()) - first + 1, dtype=torch.float64)
    counts.index_add_(0, bins - first, seen.counts)
    limits = {
        name: estimate_range(observer, estimator, TensorSpec(integer(8), "tensor"))[1]
        for name, estimator in ESTIMATORS.items()
    }
    return {
        "site": site,
        "edges": [2 ** ((first + index) / 4) for index in range(len(counts) + 1)],
        "counts": counts.tolist(),
        "limits": limits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="from the data that is there")
    if not parser.parse_args().render:
        DATA.write_text(json.dumps(measure(), separators=(",", ":")) + "\n")
    data = json.loads(DATA.read_text())
    PAGE.write_text(page(data, json.loads(BESIDE.read_text())))
    from benchmarks.study_pictures import draw

    draw(data, ROOT / "docs" / "images")
    print(f"written: {PAGE.relative_to(ROOT)} and docs/images")


if __name__ == "__main__":
    main()
