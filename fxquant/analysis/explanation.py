"""``explain``: Δloss taken apart, by exact methods on one float graph."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.analysis.announcement import announce, least_seconds
from fxquant.analysis.calibrated import attended_tokens
from fxquant.analysis.effects import EFFECTS, GROUPED, WORST
from fxquant.analysis.inputs import (
    Windows,
    as_batches,
    as_windows,
    baseline_notes,
    check_unseen,
    observed_graph,
    restricted,
    unpadded,
    watched,
)
from fxquant.analysis.interruption import kept
from fxquant.analysis.lab import Lab
from fxquant.analysis.prediction import expected, plain_forward
from fxquant.analysis.progress import Progress
from fxquant.analysis.purse import Purse
from fxquant.analysis.report import Explanation
from fxquant.analysis.sites import simulated_sites
from fxquant.analysis.store import Store, fingerprint
from fxquant.analysis.study import Study
from fxquant.errors import SchemeError
from fxquant.files.doors import Location
from fxquant.files.locks import writable
from fxquant.frontends.tracing import trace
from fxquant.pipeline.arguments import checked_call
from fxquant.recipes.conversion import recipe
from fxquant.recipes.repairs import resolve_repairs
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import Scheme, SchemeLike, as_scheme

METHODS = (*EFFECTS, WORST, *GROUPED, "causes", "causes:kinds", "path", "first_order")
DEFAULT_METHODS = (WORST, "in_order:kinds", "causes")
FULL_METHODS = ("in_order", "causes", "causes:kinds", "rescue", "path")
FULL = "full"


@checked_call(windows="data", text="data", dataset="data", calibration_data="calibration")
def explain(
    model: PreTrainedModel | GraphModule,
    scheme: SchemeLike,
    *,
    calibration: Batches | None = None,
    data: Windows | None = None,
    methods: str | Sequence[str] = DEFAULT_METHODS,
    sites: str | None = None,
    progress: bool | None = None,
    worst: int = 3,
    minutes: float = 1.0,
    tokenizer: Tokenizer | None = None,
    output: Location | None = None,
    allow_overlap: bool = False,
) -> Explanation:
    """Take the loss difference of a scheme apart: where it enters, why, and what would repair it.

    Args:
        model: a Hugging Face causal LM or a float graph from ``trace``; never modified.
        scheme: as for ``convert``.
        calibration: as for ``convert``; needed by static schemes.
        data: windows to measure the loss on: LongTensor [N, L], or several [b, L]; each is run by
            itself, and a dynamic range is of one of them. None: the calibration batches' tokens,
            which must not be padded then.
        methods: one or more of "alone", "rescue", "in_order" (each also with ":kinds" or ":blocks",
            where the sites of a group are changed together, which is cheaper), "in_order:worst"
            (in_order by block, and by site in the worst blocks), "causes" (of the model and of the
            worst sites), "causes:kinds", "path" and "first_order"; or "full", the study that
            FULL_METHODS lists. The local figures of every site are always there.
        sites: a glob that restricts the scheme to the sites it covers.
        progress: the expected cost before the start, then bars, on stderr; plain lines where it is
            no terminal; None: on a terminal alone.
        worst: at how many of the worst sites other choices are tried and causes are measured; 0
            also leaves out the recovery curve.
        minutes: after which the default methods start nothing that can be left out (the report
            says what was); math.inf: nothing is. Other methods are run as they are asked for.
        tokenizer: to show tokens as text and tell delimiters apart.
        output: a folder where finished losses are kept; the same call goes on from them, and no
            other may at the same time.
        allow_overlap: measure on windows that hold what is calibrated on; a note says so.

    Raises SchemeError (unknown method, nothing to quantize, ``sites`` covers nothing), DataError,
    CalibrationError and what ``convert`` raises, before any measurement.
    """
    scheme = as_scheme(scheme)
    repairs = resolve_repairs(scheme)
    methods = check_request(methods, worst, minutes)
    folder = writable(output, "output")
    notes: list[str] = []
    graph = model if isinstance(model, GraphModule) else trace(model)
    batches = as_batches(calibration, graph)
    windows = as_windows(_measured_on(data, batches, notes), graph)
    notes += check_unseen(graph, windows, data, batches, calibration, allow_overlap)
    notes += baseline_notes(repairs)
    narrowed = restricted(scheme, sites, graph)
    recipe(narrowed, calibration=batches)  # raises where calibration is missing
    asked = _Request(scheme, narrowed, methods, worst, minutes, sites, tokenizer, folder)
    return _measured(asked, graph, windows, batches, watched(calibration, batches), notes, progress)


def _measured_on(
    data: Windows | None, batches: Sequence[dict[str, Tensor]] | None, notes: list[str]
) -> Windows | None:
    if data is not None or batches is None:
        return data
    notes.append("the loss is measured on the calibration batches: no other data were given")
    return unpadded(batches)


@dataclass(frozen=True)
class _Request:
    """What was asked for, checked; ``narrowed``: the scheme at the sites that ``sites`` covers."""

    scheme: Scheme
    narrowed: Scheme
    methods: tuple[str, ...]
    worst: int
    minutes: float
    sites: str | None
    tokenizer: Tokenizer | None
    output: Path | None

    @property
    def seconds(self) -> float:
        """After which nothing more is started that can be left out."""
        return 60 * self.minutes if self.methods == DEFAULT_METHODS else math.inf

    def decode(self, token: int) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode([token]))


def _measured(
    asked: _Request,
    graph: GraphModule,
    windows: tuple[Tensor, ...],
    batches: list[dict[str, Tensor]] | None,
    read: Iterable[dict[str, Tensor]] | None,
    notes: list[str],
    progress: bool | None,
) -> Explanation:
    """Say the cost, calibrate, run the study. ``read``: the batches, to calibrate on."""
    narrowed, methods, worst = asked.narrowed, asked.methods, asked.worst
    purse = Purse(asked.seconds)
    plain = Lab(graph, windows)
    forward_seconds, loss = plain_forward(plain)
    cost = expected(graph, narrowed, methods, worst, plain.tokens_in, batches)
    seconds = {step.name: step.seconds(forward_seconds) for step in cost}
    most = max(purse.seconds, least_seconds(cost, forward_seconds))
    shown = Progress(progress, seconds, most=most)
    announce(shown, narrowed, cost, forward_seconds, methods, windows, purse.seconds)
    with shown.step("calibration", 1):
        observed = observed_graph(graph, narrowed, read, progress is not False)
    tensors = [value for batch in batches or () for _, value in sorted(batch.items())]
    with Store(asked.output, fingerprint(observed, [*windows, *tensors], str(narrowed))) as store:
        study = Study(
            lab=Lab(observed, windows),
            sites=simulated_sites(observed, narrowed),
            batches=read,
            calibration_tokens=sum(map(attended_tokens, batches or ())),
            store=store,
            progress=shown,
            purse=purse,
            forward_seconds=forward_seconds,
            notes=notes,
            decode=None if asked.tokenizer is None else functools.cache(asked.decode),
            seconds=seconds,
            repaired=bool(asked.scheme.repairs),
        )
        with kept(store):
            return study.run(methods, worst, str(asked.scheme), asked.sites, loss)


def check_request(
    methods: str | Sequence[str], worst: int, minutes: float = 1.0
) -> tuple[str, ...]:
    """The methods without repetitions, "full" spelled out.

    Raises SchemeError for methods, a number of sites or a time that cannot be asked for.
    """
    named = (methods,) if isinstance(methods, str) else methods
    listed = [m for name in named for m in (FULL_METHODS if name == FULL else (name,))]
    unknown = [method for method in listed if method not in METHODS]
    if unknown:
        raise SchemeError(
            f"unknown method {', '.join(unknown)}: known are {', '.join((*METHODS, FULL))}"
        )
    if worst < 0:
        raise SchemeError(f"worst must be at least 0, got {worst}")
    if not minutes >= 0:
        raise SchemeError(f"minutes must be at least 0, got {minutes}")
    if "in_order" in listed:  # of every site: the other is a part of it
        listed = [method for method in listed if method != WORST]
    return tuple(dict.fromkeys(listed))
