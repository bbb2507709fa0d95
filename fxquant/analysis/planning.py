"""``plan``: mixed precision under a budget of loss, from measured effects, verified at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel

from fxquant.analysis.costs import COSTS, Cost, mean_cost
from fxquant.analysis.inputs import Windows, as_batches, as_windows, check_unseen, watched
from fxquant.analysis.interruption import kept
from fxquant.analysis.lab import FLOAT_SETTING, Lab, setting
from fxquant.analysis.plan_cost import PLANS, SITES, announce_plan, plan_forwards, plans_of
from fxquant.analysis.plan_result import Measured, Plan, Reference, spelled
from fxquant.analysis.prediction import plain_forward, seconds_of
from fxquant.analysis.progress import Progress
from fxquant.analysis.search import candidates
from fxquant.analysis.sites import SimulatedSite, SiteMaker
from fxquant.analysis.store import Store, fingerprint
from fxquant.analysis.upgrades import States, climbs, order_upgrades
from fxquant.errors import BudgetError, DataError, SchemeError
from fxquant.files.doors import Location
from fxquant.files.locks import writable
from fxquant.frontends.tracing import trace
from fxquant.ir.graph import Site, device_of, info
from fxquant.ir.weights import check_chosen
from fxquant.pipeline.arguments import checked_call
from fxquant.recipes.conversion import convert
from fxquant.recipes.running import running_level
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import FLOAT, SiteSpec

DEFAULT_CHOICES = ("w4-g128-asym/a8-dynamic-token", "w8a8-dynamic-token", "w8", "fp")


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is to keep and what it is measured on: the arguments of ``plan``."""

    data: Windows
    budget: float
    calibration: Batches | None = None
    choices: Sequence[str] = DEFAULT_CHOICES
    cost: str = "bits"
    progress: bool | None = None
    output: Location | None = None
    allow_overlap: bool = False
    held_out: Windows | None = None
    level: str = "auto"


@checked_call(windows="data", text="data", dataset="data", calibration_data="calibration")
def plan(
    model: PreTrainedModel | GraphModule,
    *,
    data: Windows,
    budget: float,
    calibration: Batches | None = None,
    choices: Sequence[str] = DEFAULT_CHOICES,
    cost: str = "bits",
    progress: bool | None = None,
    output: Location | None = None,
    allow_overlap: bool = False,
    held_out: Windows | None = None,
    level: str = "auto",
) -> Scheme:
    """The cheapest per-site choices found whose measured loss stays within ``budget``.

    Args:
        model: a Hugging Face causal LM or a float graph from ``trace``.
        data: windows to measure on, as for ``explain``.
        budget: largest allowed loss difference to the float model, nats a token.
        calibration: needed when a choice has a static range.
        choices: site specs such as "w8a8-dynamic-token" or "fp"; every linear of the blocks gets
            one of them.
        cost: what is to be small: "bits" (of weight and activation operands together, 16 for a
            float one) or "storage" (stored weight bits).
        progress: what it is going to cost, bars, and at the end what was found, on stderr; plain
            lines where it is no terminal; None: on a terminal alone.
        output: a folder where finished losses are kept; the same call goes on from them.
        allow_overlap: measure on windows that hold what is calibrated on.
        held_out: other windows, to measure the finished plan on: on ``data`` it was chosen, and the
            budget is kept there alone.
        level: of the graphs that the plan's loss is measured on: "qdq", "integer", "kernels", or
            "auto": kernels on CUDA, else integer.

    Returns a Scheme with overrides, which round-trips as JSON and feeds ``convert``.

    Raises BudgetError when not even the best choice at every site keeps the budget (it names the
    best measured loss), SchemeError, DataError and CalibrationError before any measurement.
    """
    asked = PlanRequest(
        data, budget, calibration, choices, cost, progress, output, allow_overlap, held_out, level
    )
    found = make_plan(model, asked)
    shown = Progress(progress, name="plan")
    for line in str(found).splitlines():
        shown.say(line)
    return found.scheme


def make_plan(model: PreTrainedModel | GraphModule, asked: PlanRequest) -> Plan:
    """``plan`` with the figures that led to it."""
    specs = parse_choices(asked.choices, asked.budget, asked.cost)
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
    observed = _observed(graph, specs, read, asked.progress is not False)
    tensors = [value for batch in batches or () for _, value in sorted(batch.items())]
    reference = Reference(graph, windows)

    def verify(scheme: Scheme) -> Measured:
        return reference.measure(convert(graph, scheme, calibration=read, level=level))

    lab = Lab(observed, windows)
    sites = [site for site in info(observed).sites if site.role == "linear"]
    forward_seconds = plain_forward(lab)[0]
    forwards = plan_forwards(lab, sites, specs)
    whole = {name: seconds_of(name, each, forward_seconds) for name, each in forwards.items()}
    shown = Progress(asked.progress, whole, name="plan")
    announce_plan(shown, asked.budget, specs, len(sites), windows, forwards, forward_seconds)
    with Store(folder, fingerprint(observed, [*windows, *tensors], "plan")) as store:
        planner = _Planner(
            lab=lab,
            sites=sites,
            specs=specs,
            cost=COSTS[asked.cost],
            budget=asked.budget,
            store=store,
            progress=shown,
        )
        with kept(store):
            found = planner.run(verify, asked.cost)
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


def parse_choices(choices: Sequence[str], budget: float, cost: str) -> dict[str, SiteSpec]:
    """The choices' specs by their text; SchemeError for a plan that cannot be made."""
    if cost not in COSTS:
        raise SchemeError(f"unknown cost {cost!r}: known are {', '.join(COSTS)}")
    if not 0 <= budget < math.inf:
        raise SchemeError(f"the budget is a finite loss difference of at least 0, got {budget}")
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


@dataclass
class _Planner:
    lab: Lab
    sites: list[Site]
    specs: dict[str, SiteSpec]
    cost: Cost
    budget: float
    store: Store
    progress: Progress

    def run(self, verify: Callable[[Scheme], Measured], cost_name: str) -> Plan:
        self.loss_float = self.lab.loss(FLOAT_SETTING)
        self.built: dict[tuple[str, str], SimulatedSite] = {}
        self.maker = SiteMaker(self.lab.gm)
        effects = self._effects()
        steps = climbs(self.sites, self.specs, self.cost, effects)
        chosen = {path: rungs[0].choice for path, rungs in steps.items()}
        upgrades = order_upgrades(steps)
        states = States(chosen, upgrades)
        cheapest = self._delta(states.at(0))
        simulated: dict[int, float] = {}
        verified: dict[int, float] = {}
        with self.progress.step(PLANS, plans_of(states.total)) as advance:

            def delta(count: int) -> float:
                if count not in simulated:
                    simulated[count] = self._delta(states.at(count))
                    advance()
                return simulated[count]

            for count in candidates(delta, simulated, states.total, self.budget):
                assignment = states.at(count)
                scheme = self._scheme(assignment)
                measured = verify(scheme)
                verified[count] = measured.delta
                if verified[count] <= self.budget:
                    return self._plan(
                        assignment, scheme, measured, cheapest, cost_name, len(verified)
                    )
        best = min(verified, key=lambda count: verified[count])
        raise BudgetError(
            f"no plan keeps the budget of {self.budget:+.4f} with {', '.join(self.specs)}: the "
            f"best that was measured, {spelled(self._counts(states.at(best)))}, still moves the "
            f"loss by {verified[best]:+.4f}; allow more, or add a better choice such as 'fp'"
        )

    def _effects(self) -> dict[str, dict[str, float]]:
        """Loss difference of each choice at each site alone, everything else in float."""
        found: dict[str, dict[str, float]] = {}
        cuts = self.lab.start()
        with torch.no_grad(), self.lab.meter.measuring("alone"):
            for site in self.progress.over(self.sites, SITES, len(self.sites)):
                found[site.path] = {}
                for name, spec in self.specs.items():
                    if spec != FLOAT:
                        each = self.maker.make(site.path, spec)
                        cuts = self.lab.advance(cuts, each.node, FLOAT_SETTING)
                        measure = partial(self.lab.loss, setting([each]), cuts)
                        loss = self.store.remember(
                            f"alone {site.path} {name}", measure, self.lab.meter
                        )
                    found[site.path][name] = 0.0 if spec == FLOAT else loss - self.loss_float
        return found

    def _delta(self, assignment: dict[str, str]) -> float:
        def measure() -> float:
            built = [
                self._built(path, name)
                for path, name in assignment.items()
                if self.specs[name] != FLOAT
            ]
            return self.lab.loss(setting(built))

        key = json.dumps(assignment, sort_keys=True)
        with torch.no_grad(), self.lab.meter.measuring("plans"):
            return self.store.remember(f"plan {key}", measure, self.lab.meter) - self.loss_float

    def _built(self, path: str, name: str) -> SimulatedSite:
        """Kept for the last choice of each site only: a site holds its weight in float."""
        if (path, name) not in self.built:
            for other in self.specs:
                self.built.pop((path, other), None)
            self.built[path, name] = self.maker.make(path, self.specs[name])
        return self.built[path, name]

    def _scheme(self, assignment: dict[str, str]) -> Scheme:
        """The most used choice for all, overrides for the rest."""
        used = list(assignment.values())
        common = max(dict.fromkeys(used), key=used.count)
        others = tuple(
            (path, self.specs[name]) for path, name in assignment.items() if name != common
        )
        return Scheme(self.specs[common], overrides=others)

    def _counts(self, assignment: dict[str, str]) -> dict[str, int]:
        used = list(assignment.values())
        return {name: used.count(name) for name in self.specs if name in used}

    def _plan(
        self,
        assignment: dict[str, str],
        scheme: Scheme,
        found: Measured,
        cheapest: float,
        cost_name: str,
        verifications: int,
    ) -> Plan:
        return Plan(
            scheme=scheme,
            budget=self.budget,
            delta_loss=found.delta,
            cheapest_delta_loss=cheapest,
            cost=mean_cost(self.cost, [(s, self.specs[assignment[s.path]]) for s in self.sites]),
            cost_name=cost_name,
            counts=self._counts(assignment),
            forwards=sum(each.forwards for each in self.lab.meter.costs.values()),
            verifications=verifications,
            chosen_on=found,
        )
