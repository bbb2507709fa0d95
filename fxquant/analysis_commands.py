"""The command lines of ``fxquant explain`` and ``fxquant plan``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch.fx import GraphModule

from fxquant.analysis.explanation import DEFAULT_METHODS, METHODS, explain
from fxquant.analysis.planning import DEFAULT_CHOICES, make_plan
from fxquant.batches import Batches
from fxquant.evaluation.data import Windows, cut_windows, load_dataset_text, load_text
from fxquant.evaluation.models import DTYPES, LoadedModel, load_model, versions
from fxquant.evaluation.results import Provenance
from fxquant.graph import float_dtype
from fxquant.tracing import trace

EXPLANATION, REPORT, PLAN, SCHEME = "explanation.json", "report.md", "plan.json", "scheme.json"
INTERRUPTED = 130


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
    parser.add_argument("--model", required=True, help="hub name, directory or package:NAME")
    parser.add_argument("--revision", help="of a hub model")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--dataset", choices=("wikitext2",), help="measure on a dataset")
    text.add_argument("--text", default="builtin", help="a UTF-8 file, or builtin (default)")
    parser.add_argument("--windows", type=int, default=2, help="to measure on (2)")
    parser.add_argument("--length", type=int, default=256, help="tokens a window (256)")
    parser.add_argument("--calibration-windows", type=int, default=16, help="static ranges (16)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration windows (0)")
    parser.add_argument(
        "--output", type=Path, help="folder for results; a run that was interrupted goes on there"
    )


def explain_command(options: argparse.Namespace) -> int:
    """Explain, print the report; 130 after an interruption."""
    loaded, graph, windows = _load(options)
    try:
        found = explain(
            graph,
            options.scheme,
            calibration=_calibration(windows),
            data=windows.evaluation,
            methods=options.methods,
            sites=options.sites,
            worst=options.worst,
            tokenizer=loaded.tokenizer,
            output=options.output,
        )
    except KeyboardInterrupt:
        return _interrupted(options)
    provenance = _provenance("explain", options, loaded, graph)
    print(f"{found}\n\n{provenance.line()}")
    if options.output is not None:
        _write(options.output / EXPLANATION, _json({**found.to_dict(), **_made_by(provenance)}))
        _write(
            options.output / REPORT, f"{found}\n\n{provenance.line()}\n\n`{provenance.command}`\n"
        )
        print(f"written to {options.output}")
    return 0


def plan_command(options: argparse.Namespace) -> int:
    """Plan, print what was found and the scheme; 130 after an interruption."""
    loaded, graph, windows = _load(options)
    try:
        found = make_plan(
            graph,
            data=windows.evaluation,
            budget=options.budget,
            calibration=_calibration(windows),
            choices=options.choices,
            cost=options.cost,
            output=options.output,
        )
    except KeyboardInterrupt:
        return _interrupted(options)
    provenance = _provenance("plan", options, loaded, graph)
    print(f"{found}\n\n{provenance.line()}")
    if options.output is None:
        print(found.scheme)
        return 0
    figures = {**asdict(found), "scheme": json.loads(found.scheme.to_json())}
    _write(options.output / PLAN, _json({**figures, **_made_by(provenance)}))
    _write(options.output / SCHEME, found.scheme.to_json() + "\n")
    print(f"written to {options.output}; {SCHEME} is a scheme for convert and evaluate")
    return 0


def _load(options: argparse.Namespace) -> tuple[LoadedModel, GraphModule, Windows]:
    """The model, its graph, windows; the text is read first, since it fails sooner."""
    text = (
        load_text(options.text) if options.dataset is None else load_dataset_text(options.dataset)
    )
    options.text_name, options.text_hash = text.name, text.digest
    loaded = load_model(
        options.model, dtype=options.dtype, device=options.device, revision=options.revision
    )
    windows = cut_windows(
        text,
        loaded.tokenizer,
        count=options.windows,
        length=options.length,
        calibration=options.calibration_windows,
        seed=options.seed,
    )
    return loaded, trace(loaded.model), windows


def _calibration(windows: Windows) -> Batches | None:
    return windows.calibration.split(1) if len(windows.calibration) else None


def _interrupted(options: argparse.Namespace) -> int:
    kept = "" if options.output is None else f"; the same command goes on from {options.output}"
    print(f"fxquant: interrupted{kept}", file=sys.stderr)
    return INTERRUPTED


def _provenance(
    command: str, options: argparse.Namespace, loaded: LoadedModel, graph: GraphModule
) -> Provenance:
    start = 2 if len(sys.argv) > 1 and sys.argv[1] == command else 1
    return Provenance(
        model=loaded.name,
        revision=loaded.revision,
        dataset=options.text_name,
        text_hash=options.text_hash,
        windows=options.windows,
        length=options.length,
        calibration_windows=options.calibration_windows,
        batch_size=1,
        dtype=str(float_dtype(graph)).removeprefix("torch."),
        device=options.device,
        seed=options.seed,
        threads=torch.get_num_threads(),
        versions=versions(),
        command=shlex.join(["fxquant", command, *sys.argv[start:]]),
    )


def _made_by(provenance: Provenance) -> dict[str, object]:
    return {"provenance": asdict(provenance)}


def _json(data: dict[str, object]) -> str:
    return json.dumps(data, indent=1) + "\n"


def _write(path: Path, text: str) -> None:
    """In one step, so that a file is never half there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
