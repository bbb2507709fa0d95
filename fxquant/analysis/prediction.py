"""What an explanation is going to cost: forwards counted on the graph, seconds from a timed one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.analysis.calibrated import READ_TOKENS
from fxquant.analysis.effects import TRIALS, WORST, By
from fxquant.analysis.inputs import named_graph
from fxquant.analysis.int8_product import multiplies_int8
from fxquant.analysis.lab import FLOAT_SETTING, Lab
from fxquant.analysis.path import MOST_FORWARDS
from fxquant.analysis.sites import Place, places, simulated_spec
from fxquant.analysis.worst_first import ALLOWANCE, ends_cost, opening_cost
from fxquant.formats.scales import FP32
from fxquant.ir.graph import Site, device_of, float_dtype, site_outputs
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import FLOAT, SiteSpec

# Seconds over those that the same nodes take in float, as measured on SmolLM2-135M: observing,
# quantizing and splitting errors cost, and of the other choices few start at the first node.
SLOWER = {"calibration": 1.0, "local figures": 3.5, "path": 1.4, "other choices": 1.2}
# The same where most of the quantized sites are computed in int8 (int8_product.py).
IN_INT8 = {
    "other choices": 0.7,
    "recovery": 0.6,
    "in_order:kinds": 0.8,
    "causes of the worst sites": 0.6,
}
USUAL = 1.1


@dataclass(frozen=True)
class Step:
    """A step of an explanation and the most forwards that it takes, by nodes; ``least``: those
    that it takes even if time is short; ``int8``: as in ``seconds_of``."""

    name: str
    forwards: float
    least: float
    int8: bool = False

    def seconds(self, forward_seconds: float) -> float:
        return seconds_of(self.name, self.forwards, forward_seconds, self.int8)

    def least_seconds(self, forward_seconds: float) -> float:
        return seconds_of(self.name, self.least, forward_seconds, self.int8)


def seconds_of(step: str, forwards: float, forward_seconds: float, int8: bool = False) -> float:
    """What so many forwards of a step are expected to take. ``int8``: quantized sites are computed
    by the processor's int8 instructions."""
    slower = {**SLOWER, **IN_INT8} if int8 else SLOWER
    return forwards * forward_seconds * slower.get(step, USUAL)


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
        weight, activation = self.spec.weight, self.spec.activation
        tensors = [weight, None if activation is None else activation.tensor]
        rounded = any(each is not None and each.scale != FP32 for each in tensors)
        if activation is None:
            return 3 if rounded else 1
        return 4 if rounded else 3

    @property
    def choices(self) -> int:
        return choice_count(self.site, self.spec.activation is not None)


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
    read = READ_TOKENS / tokens
    sites = planned_sites(named, scheme)
    steps = predict(named, sites, methods, worst, calibration, read)
    likes = float_dtype(named), device_of(named)
    int8 = 2 * sum(multiplies_int8(*likes, each.site, each.spec) for each in sites) > len(sites)
    # Dynamic ranges are not calibrated; other choices read the batches all the same.
    return [
        replace(step, int8=int8)
        for step in steps
        if step.name != "calibration" or scheme.needs_calibration
    ]


def predict(
    graph: GraphModule,
    sites: Sequence[PlannedSite],
    methods: Sequence[str],
    worst: int,
    calibration: float,
    read: float = math.inf,
) -> list[Step]:
    """The steps of a run, in their order. ``calibration``: its tokens over those of the windows,
    of which other choices read at most ``read``."""
    where = places(graph, sites)
    found = [Step("calibration", calibration, calibration)] if calibration else []
    found.append(Step("local figures", 2.0, 2.0))  # and the float loss
    for method in methods:
        found += _method(method, sites, where, worst)
    if worst:
        each = sorted((1 + site.choices for site in sites), reverse=True)[:worst]
        read = 1 + min(calibration, read)
        found.append(Step("other choices", read + sum(each), read + each[0]))
        found.append(Step("recovery", float(len(sites).bit_length()), 0.0))
    return found


def _method(
    method: str, sites: Sequence[PlannedSite], where: dict[str, Place], worst: int
) -> Iterator[Step]:
    parts = max(site.parts for site in sites)
    if method == WORST:
        runs: dict[str, list[PlannedSite]] = {}
        for site in sites:
            runs.setdefault(where[site.path].block or site.path, []).append(site)
        ends = ends_cost(run[-1].behind for run in runs.values())
        inner = [opening_cost([s.behind for s in run[:-1]]) for run in runs.values() if run[1:]]
        most = max(inner, default=0.0)
        whole = ends + min(max(ALLOWANCE, most), sum(inner))
        yield Step(method, whole, whole)
    elif method in TRIALS:
        yield Step(method, 1 + sum(_firsts(sites, where, TRIALS[method].by)), 0.0)
    elif method == "causes:kinds":
        yield Step(
            method, sum(1 + 2**parts * first for first in _firsts(sites, where, "kinds")), 0.0
        )
    elif method == "causes":
        yield Step(method, 2.0**parts - 2, 2.0**parts - 2)
        own = sorted((2**site.parts - 2 for site in sites if site.parts > 1), reverse=True)
        if worst and own:  # the loss with the site in float is measured with the other choices
            yield Step("causes of the worst sites", 1.0 + sum(own[:worst]), 0.0)
    else:
        yield Step(method, MOST_FORWARDS[method], MOST_FORWARDS[method])


def _firsts(sites: Sequence[PlannedSite], where: dict[str, Place], by: By | None) -> list[float]:
    """The share of the graph behind the first site of each group; without groups, of each site."""
    if by is None:
        return [site.behind for site in sites]
    firsts: dict[str, float] = {}
    for site in sites:  # in graph order
        place = where[site.path]
        name = place.kind if by == "kinds" or place.block is None else place.block
        firsts.setdefault(name, site.behind)
    return list(firsts.values())


def choice_count(site: Site, quantized_input: bool) -> int:
    """The most other choices at a site but for float: see counterfactuals.choices."""
    if site.role == "matmul":
        return 2
    return 9 if quantized_input else 1


@torch.no_grad()
def plain_forward(lab: Lab) -> tuple[float, float]:
    """Seconds of a float forward with its loss over all windows, the unit of cost; and the loss.

    Behind a forward of the first window, which warms up.
    """
    lab.nll(lab.start()[0], lab.windows[0], FLOAT_SETTING)
    started = time.perf_counter()
    loss = lab.loss(FLOAT_SETTING)
    return time.perf_counter() - started, loss
