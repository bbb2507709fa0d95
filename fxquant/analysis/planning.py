"""``plan``: mixed formats under a budget of loss or of bits, from measured effects, verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel

from fxquant.analysis.budget import Budget, as_budget
from fxquant.analysis.inputs import (
    Windows,
    as_batches,
    as_windows,
    check_unseen,
    named_graph,
    watched,
)
from fxquant.analysis.interruption import kept
from fxquant.analysis.lab import Lab
from fxquant.analysis.plan_cost import announce_plan, plan_forwards
from fxquant.analysis.plan_result import Measured, Plan, Reference
from fxquant.analysis.planner import Planner, limit_of
from fxquant.analysis.prediction import plain_forward, seconds_of
from fxquant.analysis.progress import Progress
from fxquant.analysis.store import Store, fingerprint
from fxquant.errors import DataError, SchemeError
from fxquant.files.doors import Location
from fxquant.files.locks import writable
from fxquant.frontends.tracing import trace
from fxquant.ir.graph import device_of, info
from fxquant.ir.weights import check_chosen
from fxquant.pipeline.arguments import checked_call
from fxquant.recipes.conversion import convert
from fxquant.recipes.running import running_level
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import SiteSpec

DEFAULT_CHOICES = ("w4-g128-asym/a8-dynamic-token", "w8a8-dynamic-token", "w8", "fp")
# Under a budget of bits: formats of about 4.25, 4.25, 4.5, 4.5 and 8 bits with their scales.
BITS_CHOICES = ("w4-g128", "we2m1-g32-e8m0-rceil", "we2m1-g16-e4m3", "w4-g16-e4m3", "w8")


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is to keep and what it is measured on: the arguments of ``plan``."""

    data: Windows
    budget: float | None = None
    calibration: Batches | None = None
    choices: Sequence[str] | None = None
    cost: str | None = None
    progress: bool | None = None
    output: Location | None = None
    allow_overlap: bool = False
    held_out: Windows | None = None
    bits: float | None = None
    level: str = "auto"


@checked_call(windows="data", text="data", dataset="data", calibration_data="calibration")
def plan(
    model: PreTrainedModel | GraphModule,
    *,
    data: Windows,
    budget: float | None = None,
    bits: float | None = None,
    calibration: Batches | None = None,
    choices: Sequence[str] | None = None,
    cost: str | None = None,
    progress: bool | None = None,
    output: Location | None = None,
    allow_overlap: bool = False,
    held_out: Windows | None = None,
    level: str = "auto",
) -> Scheme:
    """The cheapest per-site choices found whose measured loss stays within ``budget``, or those of
    the least loss found within so many ``bits`` a weight: one of the two is given.

    Args:
        model: a Hugging Face causal LM or a float graph from ``trace``.
        data: windows to measure on, as for ``explain``.
        budget: largest allowed loss difference to the float model, nats a token.
        bits: largest mean ``cost`` of a weight, scales included, such as 4.5.
        calibration: needed when a choice has a static range.
        choices: site specs such as "w8a8-dynamic-token" or "fp"; every linear of the blocks gets
            one of them. None: DEFAULT_CHOICES, under a budget of bits BITS_CHOICES.
        cost: what is to be small: "bits" (of weight and activation operands together, 16 for a
            float one) or "storage" (stored weight bits); None: "bits" where ``budget`` is given,
            "storage" where ``bits`` is.
        progress: what it is going to cost, bars, and at the end what was found, on stderr; plain
            lines where it is no terminal; None: on a terminal alone.
        output: a folder where finished losses are kept; the same call goes on from them.
        allow_overlap: measure on windows that hold what is calibrated on.
        held_out: other windows, to measure the finished plan on: on ``data`` it was chosen, and the
            budget of loss is kept there alone.
        level: of the graphs that the plan's loss is measured on: "qdq", "integer", "kernels",
            "kernels-inexact", or "auto": kernels on CUDA, else integer.

    Returns a Scheme with overrides, which round-trips as JSON and feeds ``convert``.

    Raises BudgetError when not even the best choice at every site keeps the budget of loss (it
    names the best measured loss), and before any measurement where the cheapest choices exceed that
    of bits; SchemeError, DataError and CalibrationError before any measurement.
    """
    asked = PlanRequest(
        *(data, budget, calibration, choices, cost, progress, output, allow_overlap, held_out),
        *(bits, level),
    )
    found = make_plan(model, asked)
    shown = Progress(progress, name="plan")
    for line in str(found).splitlines():
        shown.say(line)
    return found.scheme


def make_plan(model: PreTrainedModel | GraphModule, asked: PlanRequest) -> Plan:
    """``plan`` with the figures that led to it."""
    specs, budget = check_plan(asked.choices, asked.budget, asked.bits, asked.cost)
    folder = writable(asked.output, "output")
    graph = model if isinstance(model, GraphModule) else trace(model)
    level = running_level(asked.level, device_of(graph))
    windows = as_windows(asked.data, graph)
    batches = as_batches(asked.calibration, graph)
    unseen = _unseen(asked.held_out, graph, windows)
    for given, ids in ((asked.data, windows), (asked.held_out, unseen)):
        if ids is not None:
            check_unseen(graph, ids, given, batches, asked.calibration, asked.allow_overlap)
    read = watched(asked.calibration, batches)
    _check_limit(graph, budget, specs)
    observed = _observed(graph, specs, read, asked.progress is not False)
    tensors = [value for batch in batches or () for _, value in sorted(batch.items())]
    reference = Reference(graph, windows)

    def verify(scheme: Scheme) -> Measured:
        return reference.measure(convert(graph, scheme, calibration=read, level=level))

    lab = Lab(observed, windows)
    sites = [site for site in info(observed).sites if site.role == "linear"]
    forward_seconds = plain_forward(lab)[0]
    forwards = plan_forwards(lab, sites, specs, budget)
    whole = {name: seconds_of(name, each, forward_seconds) for name, each in forwards.items()}
    shown = Progress(asked.progress, whole, name="plan")
    announce_plan(shown, budget, specs, len(sites), windows, forwards, forward_seconds)
    with Store(folder, fingerprint(observed, [*windows, *tensors], "plan")) as store:
        planner = Planner(lab, sites, specs, budget, store, shown)
        with kept(store):
            found = planner.run(verify)
            if unseen is not None:
                other = Reference(graph, unseen)
                last = convert(graph, found.scheme, calibration=read, level=level)
                measured = other.measure(last)
                found = replace(found, held_out=measured)
    return found


def _unseen(
    held_out: Windows | None, graph: GraphModule, windows: Sequence[Tensor]
) -> tuple[Tensor, ...] | None:
    """The windows that have no part in the plan; DataError where one of them is in ``windows``."""
    if held_out is None:
        return None
    found = as_windows(held_out, graph, "held_out")
    known = {tuple(row.tolist()) for ids in windows for row in ids}
    seen = sum(tuple(row.tolist()) in known for ids in found for row in ids)
    if seen:
        raise DataError(f"{seen} of the windows of held_out= are windows of data= too")
    return found


def _check_limit(graph: GraphModule, budget: Budget, specs: Mapping[str, SiteSpec]) -> None:
    """BudgetError where the cheapest choices of all sites exceed a budget of bits."""
    if budget.bits is not None:
        named = info(named_graph(graph, Scheme()))
        limit_of(budget, [site for site in named.sites if site.role == "linear"], specs)


def check_plan(
    choices: Sequence[str] | None, budget: float | None, bits: float | None, cost: str | None
) -> tuple[dict[str, SiteSpec], Budget]:
    """The choices' specs and what is to be kept; SchemeError for a plan that cannot be made."""
    kept = as_budget(budget, bits, cost)
    usual = DEFAULT_CHOICES if bits is None else BITS_CHOICES
    return parse_choices(usual if choices is None else choices), kept


def parse_choices(choices: Sequence[str]) -> dict[str, SiteSpec]:
    """The choices' specs by their text; SchemeError where a plan cannot choose among them."""
    specs: dict[str, SiteSpec] = {}
    if isinstance(choices, str):
        raise SchemeError(f"choices is a list of at least two specs for a site, not {choices!r}")
    for text in choices:
        scheme = Scheme.parse(text)
        if scheme.repairs or scheme.overrides or scheme.fp32_gemm:
            raise SchemeError(f"a choice is one site's spec such as 'w8' or 'fp', not {text!r}")
        specs[str(scheme)] = scheme.spec
    if len(specs) < 2:
        raise SchemeError(f"a plan needs at least two different choices, got {list(specs)}")
    return specs


def _observed(
    graph: GraphModule,
    specs: dict[str, SiteSpec],
    batches: Batches | None,
    progress: bool,
) -> GraphModule:
    """Calibrated at every site where one of the choices has a static range; SchemeError where a
    repair has chosen codes that a choice would have to choose again."""
    for path, module in graph.named_modules():
        for spec in specs.values():
            if spec.weight is not None:
                check_chosen(module, spec.weight, path)
    static = [s for s in specs.values() if s.activation is not None and not s.activation.dynamic]
    scheme = Scheme(static[0] if static else next(s for s in specs.values() if s.weight))
    return convert(graph, scheme, calibration=batches, level="observed", progress=progress)
