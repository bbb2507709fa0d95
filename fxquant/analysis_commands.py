"""The command lines of ``fxquant explain`` and ``fxquant plan``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch.fx import GraphModule

from fxquant.analysis.explanation import DEFAULT_METHODS, METHODS, explain
from fxquant.analysis.planning import DEFAULT_CHOICES, make_plan
from fxquant.batches import Batches
from fxquant.evaluation.arguments import (
    INTERRUPTED,
    add_model_arguments,
    add_text_arguments,
    job_of,
)
from fxquant.evaluation.data import Windows
from fxquant.evaluation.job import check_job, cut, make_provenance, open_sources
from fxquant.evaluation.models import LoadedModel, load_model
from fxquant.evaluation.provenance import Provenance
from fxquant.locks import hold_folder
from fxquant.tracing import trace
from fxquant.whole_file import write_text

EXPLANATION, REPORT, PLAN, SCHEME = "explanation.json", "report.md", "plan.json", "scheme.json"


@dataclass(frozen=True)
class Material:
    """What a command works on, and what made it."""

    loaded: LoadedModel
    graph: GraphModule
    windows: Windows
    provenance: Provenance


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--scheme", required=True, help="such as w8a8-static: docs/schemes.md")
    parser.add_argument(
        "--methods", nargs="+", default=list(DEFAULT_METHODS), choices=METHODS, metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: {' '.join(DEFAULT_METHODS)})",
    )  # fmt: skip
    parser.add_argument("--sites", help="a glob: quantize only the sites that it covers")
    parser.add_argument("--worst", type=int, default=3, help="sites to try other choices at (3)")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument(
        "--budget", type=float, required=True, help="largest loss difference, nats a token"
    )
    parser.add_argument(
        "--choices", nargs="+", default=list(DEFAULT_CHOICES), help="specs for a site, such as fp"
    )
    parser.add_argument("--cost", default="bits", help="bits (of both operands) or storage")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_text_arguments(parser, length=256)
    parser.add_argument("--windows", type=int, default=2, help="to measure on (2)")
    parser.add_argument(
        "--output", type=Path, help="folder for results; a run that was interrupted goes on there"
    )


def explain_command(options: argparse.Namespace) -> int:
    """Explain, print the report; 130 after an interruption."""
    with hold_folder(options.output):
        return _explain(options)


def _explain(options: argparse.Namespace) -> int:
    material = _load(options)
    try:
        found = explain(
            material.graph,
            options.scheme,
            calibration=_calibration(material.windows),
            data=material.windows.evaluation,
            methods=options.methods,
            sites=options.sites,
            worst=options.worst,
            tokenizer=material.loaded.tokenizer,
            output=options.output,
        )
    except KeyboardInterrupt:
        return _interrupted(options)
    found = replace(found, model=material.loaded.name)  # not the directory it was loaded from
    provenance = material.provenance
    print(f"{found}\n\n{provenance.line()}")
    if options.output is not None:
        write_text(options.output / EXPLANATION, _json({**found.to_dict(), **_made_by(provenance)}))
        write_text(
            options.output / REPORT, f"{found}\n\n{provenance.line()}\n\n`{provenance.command}`\n"
        )
        print(f"written to {options.output}")
    return 0


def plan_command(options: argparse.Namespace) -> int:
    """Plan, print what was found and the scheme; 130 after an interruption."""
    with hold_folder(options.output):
        return _plan(options)


def _plan(options: argparse.Namespace) -> int:
    material = _load(options)
    try:
        found = make_plan(
            material.graph,
            data=material.windows.evaluation,
            budget=options.budget,
            calibration=_calibration(material.windows),
            choices=options.choices,
            cost=options.cost,
            output=options.output,
        )
    except KeyboardInterrupt:
        return _interrupted(options)
    provenance = material.provenance
    print(f"{found}\n\n{provenance.line()}")
    if options.output is None:
        print(found.scheme)
        return 0
    figures = {**asdict(found), "scheme": json.loads(found.scheme.to_json())}
    write_text(options.output / PLAN, _json({**figures, **_made_by(provenance)}))
    write_text(options.output / SCHEME, found.scheme.to_json() + "\n")
    print(f"written to {options.output}; {SCHEME} is a scheme for convert and evaluate")
    return 0


def _load(options: argparse.Namespace) -> Material:
    """The model, its graph, windows; the text is read first, since it fails sooner."""
    job = job_of(options, tuple(filter(None, [getattr(options, "scheme", None)])))
    check_job(job)
    source, other = open_sources(job)
    loaded = load_model(job.model, dtype=job.dtype, device=job.device, revision=job.revision)
    windows = cut(job, source, other, loaded)
    graph = trace(loaded.model)
    return Material(
        loaded, graph, windows, make_provenance(job, loaded, graph, source, other, windows)
    )


def _calibration(windows: Windows) -> Batches | None:
    return windows.calibration.split(1) if len(windows.calibration) else None


def _interrupted(options: argparse.Namespace) -> int:
    kept = "" if options.output is None else f"; the same command goes on from {options.output}"
    print(f"fxquant: interrupted{kept}", file=sys.stderr)
    return INTERRUPTED


def _made_by(provenance: Provenance) -> dict[str, object]:
    return {"provenance": asdict(provenance)}


def _json(data: dict[str, object]) -> str:
    return json.dumps(data, indent=1) + "\n"
