"""The command lines of ``fxquant explain`` and ``fxquant plan``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch.fx import GraphModule

from fxquant.analysis.explanation import (
    DEFAULT_METHODS,
    FULL_METHODS,
    METHODS,
    check_request,
    explain,
)
from fxquant.analysis.planning import DEFAULT_CHOICES, make_plan, parse_choices
from fxquant.cli.arguments import (
    add_model_arguments,
    add_text_arguments,
    job_of,
    number,
    whole,
    window_count,
)
from fxquant.cli.signals import INTERRUPTED, signal_name
from fxquant.evaluation.job import check_job, check_windows, cut, make_provenance, open_sources
from fxquant.evaluation.models import LoadedModel, check_float, load_model
from fxquant.evaluation.provenance import Provenance
from fxquant.evaluation.token_windows import Windows
from fxquant.files.locks import hold_folder
from fxquant.files.whole_file import write_text
from fxquant.ir.calibration import CalibrationRecord
from fxquant.pipeline.recording import SizedRecording
from fxquant.schemes.scheme import as_scheme

EXPLANATION, REPORT, PLAN, SCHEME = "explanation.json", "report.md", "plan.json", "scheme.json"


@dataclass(frozen=True)
class Material:
    """What a command works on, and what made it; ``recording``: sees what is read to calibrate."""

    loaded: LoadedModel
    graph: GraphModule
    windows: Windows
    provenance: Provenance
    recording: SizedRecording | None
    calibration: tuple[CalibrationRecord, ...] = ()

    def finished(self, command: str) -> Material:
        """After the run: with a record of the batches that it took, if it took any."""
        if self.recording is None or not self.recording.taken:
            return self
        found = (self.recording.record(self.graph, command),)
        return replace(self, calibration=found, provenance=self.provenance.calibrated(found))


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, windows=1)
    parser.add_argument(
        "--scheme", required=True, help="such as w8a8-static, or FILE.json: docs/schemes.md"
    )
    methods = parser.add_mutually_exclusive_group()
    methods.add_argument(
        "--methods", nargs="+", default=list(DEFAULT_METHODS), choices=METHODS, metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: {' '.join(DEFAULT_METHODS)})",
    )  # fmt: skip
    methods.add_argument(
        "--full", dest="methods", action="store_const", const=list(FULL_METHODS),
        help=f"the full study, several times as long: {' '.join(FULL_METHODS)}",
    )  # fmt: skip
    parser.add_argument("--sites", help="a glob: quantize only the sites that it covers")
    parser.add_argument("--worst", type=whole, default=3, help="sites to try other choices at (3)")
    parser.add_argument(
        "--minutes", type=number, default=1.0,
        help="of the default methods, start nothing after it that can be left out (1)",
    )  # fmt: skip


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, windows=2)
    parser.add_argument(
        "--budget", type=number, required=True, help="largest loss difference, nats a token"
    )
    parser.add_argument(
        "--choices", nargs="+", default=list(DEFAULT_CHOICES), help="specs for a site, such as fp"
    )
    parser.add_argument("--cost", default="bits", help="bits (of both operands) or storage")


def _add_common(parser: argparse.ArgumentParser, windows: int) -> None:
    add_model_arguments(parser)
    add_text_arguments(parser, length=256)
    parser.add_argument(
        "--windows", type=window_count, default=windows, help=f"to measure on, or all ({windows})"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for results; a run that was interrupted goes on there"
    )


def explain_command(options: argparse.Namespace) -> int:
    """Explain, print the report; 130 after an interruption."""
    with hold_folder(options.output):
        return _explain(options)


def _explain(options: argparse.Namespace) -> int:
    as_scheme(options.scheme)
    check_request(options.methods, options.worst, options.minutes)
    material = _load(options)
    try:
        found = explain(
            material.graph,
            options.scheme,
            calibration=material.recording,
            data=material.windows.evaluation,
            methods=options.methods,
            sites=options.sites,
            progress=True,
            worst=options.worst,
            minutes=options.minutes,
            tokenizer=material.loaded.tokenizer,
            output=options.output,
            allow_overlap=True,  # cut keeps them apart, by position
        )
    except KeyboardInterrupt as stop:
        return _interrupted(options, stop)
    found = replace(found, model=material.loaded.name)  # not the directory it was loaded from
    material = material.finished(options.command_name)
    provenance = material.provenance
    print(f"{found}\n\n{provenance.line()}")
    if options.output is not None:
        write_text(options.output / EXPLANATION, _json({**found.to_dict(), **_made_by(material)}))
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
    parse_choices(options.choices, options.budget, options.cost)
    material = _load(options)
    try:
        found = make_plan(
            material.graph,
            data=material.windows.evaluation,
            budget=options.budget,
            calibration=material.recording,
            choices=options.choices,
            cost=options.cost,
            output=options.output,
            allow_overlap=True,  # cut keeps them apart, by position
        )
    except KeyboardInterrupt as stop:
        return _interrupted(options, stop)
    material = material.finished(options.command_name)
    provenance = material.provenance
    print(f"{found}\n\n{provenance.line()}")
    if options.output is None:
        print(found.scheme)
        return 0
    figures = {**asdict(found), "scheme": json.loads(found.scheme.to_json())}
    write_text(options.output / PLAN, _json({**figures, **_made_by(material)}))
    write_text(options.output / SCHEME, found.scheme.to_json() + "\n")
    print(f"written to {options.output}; {SCHEME} is a scheme for convert and evaluate")
    return 0


def _load(options: argparse.Namespace) -> Material:
    """The model, its graph, windows; the text is read first, since it fails sooner."""
    job = job_of(options, tuple(filter(None, [getattr(options, "scheme", None)])))
    check_job(job)
    check_float(job.model)
    source, other = open_sources(job)
    loaded = load_model(job.model, dtype=job.dtype, device=job.device, revision=job.revision)
    windows = cut(job, source, other, loaded)
    graph = loaded.graph
    check_windows(windows, graph)
    made = make_provenance(job, loaded, graph, source, windows).calibrated(())
    recording = None if windows.batches is None else SizedRecording(windows.batches)
    return Material(loaded, graph, windows, made, recording)


def _interrupted(options: argparse.Namespace, stop: KeyboardInterrupt) -> int:
    """Say what is kept."""
    finished = ", ".join(getattr(stop, "__notes__", ())) or "nothing new was finished"
    if options.output is None:
        text = f"{finished}, and nothing is kept: --output DIR keeps finished losses"
    else:
        text = f"{finished}; the same command goes on from {options.output}"
    print(f"fxquant: interrupted by {signal_name(stop)}: {text}", file=sys.stderr)
    return INTERRUPTED


def _made_by(material: Material) -> dict[str, object]:
    calibration = [asdict(record.brief()) for record in material.calibration]
    return {"provenance": asdict(material.provenance), "calibration": calibration}


def _json(data: dict[str, object]) -> str:
    return json.dumps(data, indent=1) + "\n"
