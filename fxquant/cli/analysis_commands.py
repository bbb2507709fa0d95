"""The command lines of ``fxquant explain`` and ``fxquant plan``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace

from torch import Tensor
from torch.fx import GraphModule

from fxquant.analysis.explanation import (
    DEFAULT_METHODS,
    FULL_METHODS,
    METHODS,
    check_request,
    explain,
)
from fxquant.analysis.planning import (
    BITS_CHOICES,
    DEFAULT_CHOICES,
    PlanRequest,
    check_plan,
    make_plan,
)
from fxquant.cli.arguments import (
    add_level_argument,
    add_model_arguments,
    add_text_arguments,
    job_of,
    number,
    place,
    whole,
    window_count,
)
from fxquant.cli.signals import INTERRUPTED, signal_name
from fxquant.errors import DataError
from fxquant.evaluation.data import Source
from fxquant.evaluation.job import (
    Job,
    check_job,
    check_windows,
    cut,
    load,
    make_provenance,
    open_sources,
)
from fxquant.evaluation.models import LoadedModel, check_float
from fxquant.evaluation.provenance import Provenance
from fxquant.evaluation.token_windows import Windows
from fxquant.files.locks import hold_folder
from fxquant.files.whole_file import write_text
from fxquant.ir.calibration import CalibrationRecord
from fxquant.ir.graph import Level
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
    held_out: Tensor | None = None

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
    parser.add_argument("--sites", help="a glob: quantize only the sites that it covers (all)")
    parser.add_argument("--worst", type=whole, default=3, help="sites to try other choices at (3)")
    parser.add_argument(
        "--minutes", type=number, default=1.0,
        help="of the default methods, start nothing after it that can be left out (1)",
    )  # fmt: skip


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, windows=2)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget", type=number, help="largest loss difference, nats a token")
    budget.add_argument("--bits", type=number, help="largest cost of a weight, such as 4.5")
    parser.add_argument(
        "--choices", nargs="+",
        help=f"specs for a site (default: {' '.join(DEFAULT_CHOICES)}; "
        f"with --bits: {' '.join(BITS_CHOICES)})",
    )  # fmt: skip
    parser.add_argument(
        "--cost",
        help="bits (of both operands) or storage (with --bits storage, else bits)",
    )
    add_level_argument(parser)
    parser.add_argument(
        "--held-out-windows", type=whole, default=4,
        help="of the text behind them, to measure the finished plan on, where there are enough (4)",
    )  # fmt: skip


def _add_common(parser: argparse.ArgumentParser, windows: int) -> None:
    add_model_arguments(parser)
    add_text_arguments(parser, length=256)
    parser.add_argument(
        "--windows", type=window_count, default=windows, help=f"to measure on, or all ({windows})"
    )
    parser.add_argument(
        "--output", type=place, help="folder for results; a run that was interrupted goes on there"
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
    # Its sites are simulated in the float graph: they compute what they do at level qdq.
    provenance = replace(material.provenance, level=str(Level.QDQ))
    material = replace(material, provenance=provenance)
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
    wish = {name: getattr(options, name) for name in ("budget", "bits", "choices", "cost")}
    choices = list(check_plan(**wish)[0])
    if options.held_out_windows < 0:
        raise DataError(f"held-out windows must be at least 0, got {options.held_out_windows}")
    material = _load(options, options.held_out_windows)
    try:
        asked = PlanRequest(
            material.windows.evaluation,
            calibration=material.recording,
            progress=True,
            output=options.output,
            allow_overlap=True,  # cut keeps them apart, by position
            held_out=material.held_out,
            level=options.level,
            **wish,
        )
        found = make_plan(material.graph, asked)
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
    kept = ("budget", "bits", "cost_name", "chosen_on", "held_out")
    chosen = {key: figures[key] for key in kept}
    made_by = {**chosen, "choices": choices, **_made_by(material)}
    write_text(options.output / SCHEME, _json({**figures["scheme"], "made_by": made_by}))
    print(f"written to {options.output}; {SCHEME} is a scheme for convert and evaluate")
    return 0


def _load(options: argparse.Namespace, held_out: int = 0) -> Material:
    """The model, its graph, windows; the text is read first, since it fails sooner.

    ``held_out``: so many windows more, where the text has them.
    """
    job = job_of(options, tuple(filter(None, [getattr(options, "scheme", None)])))
    check_job(job)
    check_float(job.model)
    source, other = open_sources(job)
    loaded = load(job)
    windows, unseen = _cut(job, source, other, loaded, held_out)
    graph = loaded.graph
    check_windows(windows, graph)
    made = make_provenance(job, loaded, graph, source, windows).calibrated(())
    recording = None if windows.batches is None else SizedRecording(windows.batches)
    return Material(loaded, graph, windows, made, recording, held_out=unseen)


def _cut(
    job: Job, source: Source, other: Source | None, loaded: LoadedModel, held_out: int
) -> tuple[Windows, Tensor | None]:
    """The job's windows, and those held out behind them, None where the text has too few."""
    if job.windows is None or not held_out:
        return cut(job, source, other, loaded), None
    count = job.windows
    try:
        found = cut(replace(job, windows=count + held_out), source, other, loaded)
    except DataError:
        return cut(job, source, other, loaded), None
    if len(found.evaluation) <= count:
        return found, None
    kept = replace(
        found,
        evaluation=found.evaluation[:count],
        scored=found.scored[:count],
        places=found.places.first(count),
        protocol=replace(found.protocol, windows=count, complete=False),
    )
    return kept, found.evaluation[count:]


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
