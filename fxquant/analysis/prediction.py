"""What an explanation is going to cost: forwards counted on the graph, seconds from a timed one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.analysis.effects import EFFECTS
from fxquant.analysis.inputs import named_graph
from fxquant.analysis.lab import Lab
from fxquant.analysis.path import MOST_FORWARDS
from fxquant.analysis.sites import Place, places, simulated_spec
from fxquant.analysis.worst_first import ALLOWANCE
from fxquant.ir.graph import Site, site_outputs
from fxquant.run.loss import token_nll
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import FLOAT, SiteSpec

# Seconds over those that the same nodes take in float, as measured on SmolLM2-135M: observing,
# quantizing and splitting errors cost, and of the other choices few start at the first node.
SLOWER = {"calibration": 1.5, "local figures": 5.0, "path": 1.4, "other choices": 1.2}
USUAL = 1.3


@dataclass(frozen=True)
class Step:
    """A step of an explanation and the most forwards that it takes, by nodes."""

    name: str
    forwards: float

    def seconds(self, forward_seconds: float) -> float:
        return self.forwards * forward_seconds * SLOWER.get(self.name, USUAL)


@dataclass(frozen=True)
class PlannedSite:
    """A site that the scheme quantizes; ``behind``: the share of the nodes from it on."""

    site: Site
    node: Node
    spec: SiteSpec
    behind: float

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def parts(self) -> int:
        """How many parts its error can have."""
        if self.site.role == "matmul":
            return 2
        return 1 if self.spec.activation is None else 3


def planned_sites(graph: GraphModule, scheme: Scheme) -> list[PlannedSite]:
    """The sites of a float graph with its sites named, in graph order."""
    nodes = list(graph.graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    found = [
        PlannedSite(site, node, simulated_spec(scheme, site), 1 - index[node] / len(nodes))
        for site, node in site_outputs(graph)
    ]
    return sorted((each for each in found if each.spec != FLOAT), key=lambda each: -each.behind)


def expected(
    graph: GraphModule,
    scheme: Scheme,
    methods: Sequence[str],
    worst: int,
    tokens: int,
    batches: Sequence[dict[str, Tensor]] | None,
) -> list[Step]:
    """The steps of explaining ``scheme`` on a traced graph; ``tokens``: of all windows."""
    named = named_graph(graph, scheme)
    calibration = sum(batch["input_ids"].numel() for batch in batches or ()) / tokens
    steps = predict(named, planned_sites(named, scheme), methods, worst, calibration)
    # Dynamic ranges are not calibrated; other choices read the batches all the same.
    return [s for s in steps if s.name != "calibration" or scheme.needs_calibration]


def predict(
    graph: GraphModule,
    sites: Sequence[PlannedSite],
    methods: Sequence[str],
    worst: int,
    calibration: float,
) -> list[Step]:
    """The steps of a run, in their order. ``calibration``: its tokens over those of the windows."""
    where = places(graph, sites)
    found = [Step("calibration", calibration)] if calibration else []
    found.append(Step("local figures", 2.0))  # and the float loss
    for method in methods:
        found += _method(method, sites, where, worst)
    if worst:
        each = sum(sorted((_choices(site) for site in sites), reverse=True)[:worst])
        alone = worst if "causes" not in methods else 0  # else float is measured with the causes
        found.append(Step("other choices", 1 + calibration + each + alone))
        found.append(Step("recovery", float(len(sites).bit_length())))
    return found


def _method(
    method: str, sites: Sequence[PlannedSite], where: dict[str, Place], worst: int
) -> Iterator[Step]:
    effect, _, by = method.partition(":")
    parts = max(site.parts for site in sites)
    if method == "in_order:worst":
        runs: dict[str, list[PlannedSite]] = {}
        for site in sites:
            runs.setdefault(where[site.path].block or site.path, []).append(site)
        ends = sum(run[-1].behind for run in runs.values())
        inner = [[site.behind for site in run[:-1]] for run in runs.values()]
        least = max(ALLOWANCE, max(map(sum, inner)))
        yield Step(method, 2 + ends + min(least, sum(map(sum, inner))))
    elif effect in EFFECTS:
        yield Step(method, 1 + sum(_firsts(sites, where, by)))
    elif method == "causes:kinds":
        yield Step(method, sum(1 + 2**parts * first for first in _firsts(sites, where, by)))
    elif method == "causes":
        yield Step(method, 2.0**parts - 2)
        own = sorted((2**site.parts - 1 for site in sites if site.parts > 1), reverse=True)
        if worst and own:
            yield Step("causes of the worst sites", 1.0 + sum(own[:worst]))
    else:
        yield Step(method, MOST_FORWARDS[method])


def _firsts(sites: Sequence[PlannedSite], where: dict[str, Place], by: str) -> list[float]:
    """The share of the graph behind the first site of each group; without groups, of each site."""
    if not by:
        return [site.behind for site in sites]
    firsts: dict[str, float] = {}
    for site in sites:  # in graph order
        place = where[site.path]
        name = place.kind if by == "kinds" or place.block is None else place.block
        firsts.setdefault(name, site.behind)
    return list(firsts.values())


def _choices(site: PlannedSite) -> int:
    """The most other choices at a site, but for float: see counterfactuals.choices."""
    return {1: 1, 2: 2, 3: 9}[site.parts]


@torch.no_grad()
def plain_forward_seconds(lab: Lab) -> float:
    """Median seconds of a float forward with its loss over all windows, the unit of cost."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        for ids in lab.windows:
            float(token_nll(lab.executor.run(input_ids=ids), ids).sum())
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])
