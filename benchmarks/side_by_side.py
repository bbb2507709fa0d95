"""int8 and E4M3 on the same static ranges, window by window: causes, kinds, sites and channels.

    python -m benchmarks.side_by_side [--minutes N]

Writes benchmarks/side_by_side.json, from which benchmarks.why_static_fails writes a part of its
page; each window is kept when it is finished, so an interrupted run goes on. The sites are those
with the largest ``alone`` under ``w8a8-static:absmax`` in benchmarks/why_static_fails.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.subjects import ROOT, Prepared, smollm2
from benchmarks.why_static_fails import DATA as STUDY
from fxquant.analysis.causes import causes_of, present_causes
from fxquant.analysis.channels import worst_channels
from fxquant.analysis.effects import Group, effects
from fxquant.analysis.inputs import observed_graph
from fxquant.analysis.lab import FLOAT_SETTING, Lab
from fxquant.analysis.local import LocalFigures, local_figures
from fxquant.analysis.parts import EVERY_PART
from fxquant.analysis.sites import SimulatedSite, places, simulated_sites
from fxquant.evaluation.data import load_text
from fxquant.evaluation.models import versions
from fxquant.files.whole_file import write_text
from fxquant.schemes.scheme import Scheme

DATA = ROOT / "benchmarks" / "side_by_side.json"
SUBJECT = smollm2(windows=8, length=512, calibration=16)
SCHEMES = ("w8a8-static:absmax", "fp8-static")
SITES = 12


def worst_sites() -> list[str]:
    """The sites at which effects and channels are kept."""
    for subject in json.loads(STUDY.read_text())["subjects"]:
        if subject["model"] == SUBJECT.model:
            sites = subject["schemes"][SCHEMES[0]]["sites"]
            sites.sort(key=lambda site: -site["alone"])
            return [str(site["site"]) for site in sites[:SITES]]
    raise KeyError(SUBJECT.model)


def read_data() -> dict[str, Any]:
    """What was measured so far."""
    known: dict[str, Any] = {"schemes": {scheme: [] for scheme in SCHEMES}}
    return json.loads(DATA.read_text()) if DATA.exists() else known


def measure_all(minutes: float) -> None:
    """Measure every window that DATA does not have; it is written after each."""
    end = time.monotonic() + 60 * minutes
    text = load_text("builtin")
    prepared = SUBJECT.prepare(text)
    chosen = worst_sites()
    for name in SCHEMES:
        measured = _measurer(prepared, Scheme.parse(name), chosen)
        for index, window in enumerate(prepared.windows.evaluation.split(1)):
            data = read_data()
            if index < len(data["schemes"][name]) or time.monotonic() > end:
                continue
            found = measured(window)
            data["schemes"][name].append(found)
            data.update(
                model=SUBJECT.model,
                revision=prepared.loaded.revision,
                name=SUBJECT.name,
                length=SUBJECT.length,
                calibration_windows=SUBJECT.calibration,
                text=text.name,
                text_hash=text.digest,
                versions=versions(),
                threads=torch.get_num_threads(),
            )
            write_text(DATA, json.dumps(data, indent=1) + "\n")
            print(f"{name}, window {index}: {found['delta_loss']:+.4f}", flush=True)


def _measurer(
    prepared: Prepared, scheme: Scheme, chosen: Sequence[str]
) -> Callable[[Tensor], dict[str, Any]]:
    """Calibrates once; then gives the figures of a window."""
    batches = prepared.windows.batches
    observed = observed_graph(prepared.graph, scheme, batches, progress=False)
    sites = simulated_sites(observed, scheme)
    return lambda window: _figures(Lab(observed, (window,)), sites, chosen)


def _figures(lab: Lab, sites: Sequence[SimulatedSite], chosen: Sequence[str]) -> dict[str, Any]:
    local, quantized = local_figures(lab, sites)
    floating = lab.loss(FLOAT_SETTING)
    known = {frozenset(): floating, EVERY_PART & frozenset(present_causes(sites)): quantized}
    causes = causes_of(lab, sites, known=known, remember=_at_once)
    where = places(lab.gm, sites)
    kinds: dict[str, list[SimulatedSite]] = {}
    for each in sites:
        kinds.setdefault(where[each.path].kind, []).append(each)
    groups = [Group(name, tuple(members)) for name, members in kinds.items()]
    groups += [Group(each.path, (each,)) for each in sites if each.path in chosen]
    alone = {name: loss - floating for name, loss in effects(lab, "alone", groups, sites, _at_once)}
    return {
        "delta_loss": quantized - floating,
        "causes": dict(causes),
        "kinds": {name: alone[name] for name in kinds},
        "sites": {path: {"alone": alone[path], **_local(local[path])} for path in chosen},
        "sqnr_db": {
            name: _mean([local[s.path].sqnr_db for s in each]) for name, each in kinds.items()
        },
        "flushed": {
            name: _mean([local[s.path].share_flushed for s in each]) for name, each in kinds.items()
        },
    }


def _at_once(_: str, compute: Callable[[], float]) -> float:
    return compute()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _local(figures: LocalFigures) -> dict[str, Any]:
    return {
        "sqnr_db": figures.sqnr_db,
        "share_flushed": figures.share_flushed,
        "share_clipped": figures.share_clipped,
        "channels": [
            {"channel": each.channel, "blame": each.blame, "peak": each.peak}
            for each in worst_channels(figures, None)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no window after so long"
    )
    measure_all(parser.parse_args().minutes)


if __name__ == "__main__":
    main()
