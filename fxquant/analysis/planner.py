"""The search for a plan: effects of each choice at each site alone, then of all sites together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from fxquant.analysis.budget import Budget
from fxquant.analysis.costs import COSTS, Cost, mean_cost
from fxquant.analysis.knapsack import best_within
from fxquant.analysis.lab import FLOAT_SETTING, Lab, setting
from fxquant.analysis.plan_cost import PLANS, SITES, plans_of
from fxquant.analysis.plan_result import Everywhere, Measured, Plan, spelled
from fxquant.analysis.progress import Progress
from fxquant.analysis.search import candidates
from fxquant.analysis.sites import SimulatedSite, SiteMaker
from fxquant.analysis.store import Store
from fxquant.analysis.upgrades import States, climbs, order_upgrades, priced
from fxquant.errors import BudgetError
from fxquant.ir.graph import Site
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import FLOAT, SiteSpec

# One format everywhere may exceed a budget by so much of a bit: the one fp32 scale that NVFP4 has
# for a whole tensor does not take it beyond 4.5.
NEARLY = 5e-4
Assignment = dict[str, str]  # a choice, by the path of its site
Verify = Callable[[Scheme], Measured]


def limit_of(budget: Budget, sites: Sequence[Site], specs: Mapping[str, SiteSpec]) -> float:
    """What all sites together may cost. Raises BudgetError where the cheapest choices cost more."""
    assert budget.bits is not None
    cost = COSTS[budget.cost]
    weights = sum(site.shape[0] * site.shape[1] for site in sites)
    limit = budget.bits * weights * (1 + 1e-12)  # a mean that was divided is as good as its sum
    least = sum(min(cost(site, spec) for spec in specs.values()) for site in sites)
    if least > limit + NEARLY * weights:
        raise BudgetError(
            f"no plan keeps {budget} with {', '.join(specs)}: the cheapest at each site take "
            f"{least / weights:.4f}, scales included; allow more, or add a cheaper choice"
        )
    return max(limit, least)


@dataclass
class Planner:
    """One search; ``specs``: the choices by their text."""

    lab: Lab
    sites: list[Site]
    specs: dict[str, SiteSpec]
    budget: Budget
    store: Store
    progress: Progress
    built: dict[tuple[str, str], SimulatedSite] = field(default_factory=dict)

    def run(self, verify: Verify) -> Plan:
        """The plan. ``verify`` measures the model that a scheme converts to."""
        self.loss_float = self.lab.loss(FLOAT_SETTING)
        effects = self._effects()
        return (
            self._of_bits(effects, verify) if self.budget.bits else self._of_loss(effects, verify)
        )

    @property
    def cost(self) -> Cost:
        return COSTS[self.budget.cost]

    @cached_property
    def maker(self) -> SiteMaker:
        return SiteMaker(self.lab.gm)

    def _of_loss(self, effects: Mapping[str, Mapping[str, float]], verify: Verify) -> Plan:
        """The fewest upgrades from the cheapest choices that keep the budget of loss."""
        assert self.budget.loss is not None
        steps = climbs(priced(self.sites, self.specs, self.cost, effects))
        chosen = {path: rungs[0].choice for path, rungs in steps.items()}
        states = States(chosen, order_upgrades(steps))
        cheapest = self._delta(states.at(0))
        simulated: dict[int, float] = {}
        verified: dict[int, float] = {}
        with self.progress.step(PLANS, plans_of(states.total)) as advance:

            def delta(count: int) -> float:
                if count not in simulated:
                    simulated[count] = self._delta(states.at(count))
                    advance()
                return simulated[count]

            for count in candidates(delta, simulated, states.total, self.budget.loss):
                assignment = states.at(count)
                measured = verify(self._scheme(assignment))
                verified[count] = measured.delta
                if verified[count] <= self.budget.loss:
                    return self._plan(assignment, measured, cheapest, len(verified))
        best = min(verified, key=lambda count: verified[count])
        raise BudgetError(
            f"no plan keeps the budget of {self.budget} with {', '.join(self.specs)}: the "
            f"best that was measured, {spelled(self._counts(states.at(best)))}, still moves the "
            f"loss by {verified[best]:+.4f}; allow more, or add a better choice such as 'fp'"
        )

    def _of_bits(self, effects: Mapping[str, Mapping[str, float]], verify: Verify) -> Plan:
        """Of the mix with the least summed effect and each choice everywhere, as far as they keep
        the budget of bits, the one that loses least with all sites together."""
        limit = limit_of(self.budget, self.sites, self.specs)
        rungs = priced(self.sites, self.specs, self.cost, effects)
        mixed = best_within(rungs, limit)
        assert mixed is not None  # limit_of has seen to it
        cheapest = {path: min(each, key=lambda r: r.cost).choice for path, each in rungs.items()}
        assert self.budget.bits is not None
        most = self.budget.bits + NEARLY
        single = [name for name in self.specs if self._mean(dict.fromkeys(rungs, name)) <= most]
        tried = [mixed, *(dict.fromkeys(rungs, name) for name in single)]
        with self.progress.step(PLANS, len(tried) + 1) as advance:
            deltas = []
            for assignment in (*tried, cheapest):
                deltas.append(self._delta(assignment))
                advance()
        best = min(range(len(tried)), key=lambda index: deltas[index])
        everywhere = tuple(
            Everywhere(name, self._mean(assignment), delta)
            for name, assignment, delta in zip(single, tried[1:], deltas[1:-1], strict=True)
        )
        measured = verify(self._scheme(tried[best]))
        return self._plan(tried[best], measured, deltas[-1], 1, everywhere)

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

    def _delta(self, assignment: Assignment) -> float:
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

    def _scheme(self, assignment: Assignment) -> Scheme:
        """The most used choice for all, overrides for the rest."""
        used = list(assignment.values())
        common = max(dict.fromkeys(used), key=used.count)
        others = tuple(
            (path, self.specs[name]) for path, name in assignment.items() if name != common
        )
        return Scheme(self.specs[common], overrides=others)

    def _counts(self, assignment: Assignment) -> dict[str, int]:
        used = list(assignment.values())
        return {name: used.count(name) for name in self.specs if name in used}

    def _mean(self, assignment: Assignment) -> float:
        return mean_cost(self.cost, [(s, self.specs[assignment[s.path]]) for s in self.sites])

    def _plan(
        self,
        assignment: Assignment,
        found: Measured,
        cheapest: float,
        verifications: int,
        everywhere: tuple[Everywhere, ...] = (),
    ) -> Plan:
        return Plan(
            scheme=self._scheme(assignment),
            budget=self.budget.loss,
            bits=self.budget.bits,
            delta_loss=found.delta,
            cheapest_delta_loss=cheapest,
            cost=self._mean(assignment),
            cost_name=self.budget.cost,
            counts=self._counts(assignment),
            forwards=sum(each.forwards for each in self.lab.meter.costs.values()),
            verifications=verifications,
            chosen_on=found,
            everywhere=everywhere,
        )
