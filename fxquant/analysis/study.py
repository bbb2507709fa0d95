"""One run of explain: the lab, and every method on it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from fxquant.analysis import path as path_method
from fxquant.analysis.calibrated import Calibrated, calibration_inputs
from fxquant.analysis.causes import causes_of, present_causes
from fxquant.analysis.channels import Decode
from fxquant.analysis.counterfactuals import (
    Counterfactual,
    Recovery,
    choices,
    measure,
    recovery_counts,
)
from fxquant.analysis.effects import (
    EFFECTS,
    Group,
    Remember,
    as_effects,
    effects,
    first_site,
    walk_to,
)
from fxquant.analysis.figures import Found, group_figures, site_figures, validate
from fxquant.analysis.lab import FLOAT_SETTING, Cuts, Lab, setting
from fxquant.analysis.local import local_figures
from fxquant.analysis.parts import EVERY_PART, Cause, Parts
from fxquant.analysis.progress import Advance, Progress
from fxquant.analysis.report import Explanation
from fxquant.analysis.results import (
    BY_MSE,
    GroupFigures,
    MethodCost,
    PathFigures,
    SiteFigures,
    is_ranked,
    rank_value,
)
from fxquant.analysis.sites import LinearSite, SimulatedSite, SiteMaker, places
from fxquant.analysis.store import Store
from fxquant.analysis.validation import shared_draw
from fxquant.analysis.worst_first import steps
from fxquant.ir.graph import info

WORST = "in_order:worst"


@dataclass
class Study:
    """One run of explain: the lab and what every method needs."""

    lab: Lab
    sites: tuple[SimulatedSite, ...]
    batches: Iterable[dict[str, Tensor]] | None
    store: Store
    progress: Progress
    forward_seconds: float
    decode: Decode | None
    notes: list[str]

    def run(
        self,
        methods: tuple[str, ...],
        worst: int,
        scheme: str,
        pattern: str | None,
        unrepaired: float | None,
    ) -> Explanation:
        lab = self.lab
        self.where = places(lab.gm, self.sites)
        self.loss_float = lab.loss(FLOAT_SETTING)
        with lab.meter.measuring("local figures"), self._windows("local figures") as advance:
            self.local, self.loss_quantized = local_figures(lab, self.sites, advance)
        plain = [m for m in methods if m.partition(":")[0] in EFFECTS and m != WORST]
        found = self._worst_first() if WORST in methods else {}
        found |= {m: self._effects(m) for m in plain}
        if "first_order" in methods:
            with lab.meter.measuring("first_order"):
                found["first_order"] = path_method.first_order(lab, self.sites)
        if "rescue" in found:
            self._note(shared_draw(found["rescue"], self.loss_quantized - self.loss_float))
        path = self._path() if "path" in methods else None
        causes = {"model": self._model_causes()} if "causes" in methods else {}
        causes |= self._kinds_causes() if "causes:kinds" in methods else {}
        ranking = _ranking(found, path)
        figures = self._figures(found, path)
        order = sorted(figures, key=lambda path: -rank_value(figures[path], ranking))
        chosen = [each for each in self.sites if each.path in order[:worst]]
        own = self._own_causes(chosen) if "causes" in methods else {}
        figures.update({name: replace(figures[name], causes=own[name]) for name in own})
        return Explanation(
            model=info(lab.gm).model,
            scheme=scheme,
            sites_pattern=pattern,
            windows=(
                sum(len(ids) for ids in lab.windows),
                max(ids.shape[1] for ids in lab.windows),
            ),
            shortest_window=min(ids.shape[1] for ids in lab.windows),
            loss_unrepaired=self.loss_float if unrepaired is None else unrepaired,
            loss_float=self.loss_float,
            loss_quantized=self.loss_quantized,
            causes=causes.get("model"),
            sites=tuple(figures[each.path] for each in self.sites),
            kinds=self._groups("kinds", figures, found, causes),
            blocks=self._groups("blocks", figures, found, {}),
            path=None if path is None else _path_figures(path),
            counterfactuals=self._counterfactuals(chosen),
            recovery=self._recovery(order, figures, ranking) if worst else (),
            validation=validate(self.local, found, path),
            ranking=ranking,
            forward_seconds=self.forward_seconds,
            costs=self._costs(),
            methods=methods,
            notes=tuple(self.notes),
        )

    def _figures(self, found: Found, path: path_method.PathResult | None) -> dict[str, SiteFigures]:
        trusted = path.sites if path is not None and path.refused is None else {}
        return {
            name: site_figures(
                name,
                place,
                found,
                self.local[name],
                trusted.get(name),
                self.lab.windows,
                self.decode,
            )
            for name, place in self.where.items()
        }

    def _note(self, text: str | None) -> None:
        self.notes += [] if text is None else [text]

    def _windows(self, name: str) -> AbstractContextManager[Advance]:
        """A step over the windows."""
        return self.progress.step(name, len(self.lab.windows))

    # Effects --------------------------------------------------------------------------------------

    def _members(self, by: str) -> dict[str, list[SimulatedSite]]:
        """Sites by kind or block; those outside the blocks form groups of their role."""
        groups: dict[str, list[SimulatedSite]] = {}
        for each in self.sites:
            place = self.where[each.path]
            name = place.kind if by == "kinds" or place.block is None else place.block
            groups.setdefault(name, []).append(each)
        return groups

    def _effects(self, method: str) -> dict[str, float]:
        effect, _, by = method.partition(":")
        groups = [Group(each.path, (each,)) for each in self.sites]
        if by:
            groups = [Group(name, tuple(sites)) for name, sites in self._members(by).items()]
        with self.lab.meter.measuring(method):
            trials = effects(self.lab, effect, groups, self.sites, self._remember(method))  # type: ignore[arg-type]
            losses = dict(self.progress.over(trials, method, len(groups)))
        return as_effects(effect, losses, self.loss_float, self.loss_quantized)  # type: ignore[arg-type]

    def _worst_first(self) -> dict[str, dict[str, float]]:
        """in_order of the worst blocks' sites, and of all blocks."""
        group_of = {
            each.path: name for name, sites in self._members("blocks").items() for each in sites
        }
        with self.lab.meter.measuring(WORST):
            found = steps(
                self.lab,
                self.sites,
                group_of,
                self.loss_float,
                self._remember("in_order"),
                lambda items, total: self.progress.over(items, WORST, total, part=0.5),
            )
        return {"in_order": found.sites, "in_order:blocks": found.groups}

    def _path(self) -> path_method.PathResult:
        with self.lab.meter.measuring("path"), self._windows("path") as advance:
            return path_method.integrate(self.lab, self.sites, advance)

    # Causes ---------------------------------------------------------------------------------------

    def _model_causes(self) -> dict[Cause, float]:
        everything = EVERY_PART & frozenset(present_causes(self.sites))
        known: dict[Parts, float] = {frozenset(): self.loss_float, everything: self.loss_quantized}
        with self.lab.meter.measuring("causes"):
            return causes_of(
                self.lab, self.sites, known=known, remember=self._remember("causes model")
            )

    def _kinds_causes(self) -> dict[str, dict[Cause, float]]:
        """Of each kind by itself."""
        kinds = self._members("kinds")
        found: dict[str, dict[Cause, float]] = {}
        with self.lab.meter.measuring("causes:kinds"):
            for name, group in self.progress.over(kinds.items(), "causes:kinds", len(kinds)):
                cuts = self.lab.advance(
                    self.lab.start(), first_site(self.lab, group).node, FLOAT_SETTING
                )
                found[name] = causes_of(
                    self.lab, group, cuts=cuts, remember=self._remember(f"causes {name}")
                )
        return found

    def _own_causes(self, chosen: Sequence[SimulatedSite]) -> dict[str, dict[Cause, float]]:
        name = "causes of the worst sites"
        chosen = [each for each in chosen if len(present_causes([each])) > 1]
        if not chosen:
            return {}
        found = {}
        with self.lab.meter.measuring(name):
            walk = walk_to(self.lab, self.sites, chosen)
            for each, cuts in self.progress.over(walk, name, len(chosen)):
                known: dict[Parts, float] = {
                    frozenset(): self._without(each, cuts),
                    EVERY_PART & frozenset(each.causes): self.loss_quantized,
                }
                found[each.path] = causes_of(
                    self.lab,
                    [each],
                    around=self.sites,
                    cuts=cuts,
                    known=known,
                    remember=self._remember(f"causes of {each.path}"),
                )
        return found

    def _without(self, site: SimulatedSite, cuts: Cuts) -> float:
        """The loss with one site in float: of its rescue, its causes and its first other choice."""
        under = setting(each for each in self.sites if each is not site)
        return self._remember("rescue")(site.path, partial(self.lab.loss, under, cuts))

    def _remember(self, prefix: str) -> Remember:
        meter = self.lab.meter
        return lambda name, compute: self.store.remember(f"{prefix} {name}", compute, meter)

    # Repairs --------------------------------------------------------------------------------------

    def _counterfactuals(self, chosen: Sequence[SimulatedSite]) -> tuple[Counterfactual, ...]:
        if not chosen:
            return ()
        maker = SiteMaker(self.lab.gm)
        # Only a quantized input has choices that are made from calibration data.
        inputs = [s for s in chosen if isinstance(s, LinearSite) and s.quantizer is not None]
        batches = self.batches
        if batches is None and inputs:
            batches = [{"input_ids": ids} for ids in self.lab.windows]
            self.notes.append(
                "smoothing factors come from the evaluation windows: no calibration data were given"
            )
        with self.lab.meter.measuring("other choices"):
            seen = calibration_inputs(self.lab, inputs, batches or ())
            found: list[Counterfactual] = []
            walk = walk_to(self.lab, self.sites, chosen)
            for each, cuts in self.progress.over(walk, "other choices", len(chosen)):
                found += measure(
                    self.lab,
                    self.sites,
                    each,
                    cuts,
                    choices(each, self.local[each.path], maker, seen.get(each.path, Calibrated())),
                    {"float": self._without(each, cuts)},
                    self.loss_float,
                    self.loss_quantized,
                    self._remember(f"choice {each.path}"),
                )
        return tuple(sorted(found, key=lambda each: -each.recovered))

    def _recovery(
        self, order: Sequence[str], figures: dict[str, SiteFigures], ranking: str
    ) -> tuple[Recovery, ...]:
        """As far as sites are ranked; the ends are known."""
        ranked = sum(is_ranked(figures[path], ranking) for path in order)
        counts = recovery_counts(len(order), ranked)
        known = {0: self.loss_quantized, len(order): self.loss_float}
        found = []
        with self.lab.meter.measuring("recovery"):
            for count in self.progress.over(counts, "recovery", len(counts)):
                fixed = set(order[:count])
                under = setting(each for each in self.sites if each.path not in fixed)
                measure = partial(self.lab.loss, under)
                loss = known.get(count)
                if loss is None:
                    loss = self._remember("recovery")(",".join(sorted(fixed)), measure)
                found.append(Recovery(count, loss - self.loss_float))
        return tuple(found)

    def _groups(
        self,
        by: str,
        figures: dict[str, SiteFigures],
        found: Found,
        causes: dict[str, dict[Cause, float]],
    ) -> tuple[GroupFigures, ...]:
        members = {name: [each.path for each in sites] for name, sites in self._members(by).items()}
        return group_figures(by, members, figures, found, causes)

    def _costs(self) -> dict[str, MethodCost]:
        # A forward that is shorter than a tick of the clock takes none of its time.
        unit = max(self.forward_seconds, time.get_clock_info("perf_counter").resolution)
        return {
            name: MethodCost(cost.forwards, cost.seconds, cost.seconds / unit, cost.partial)
            for name, cost in self.lab.meter.costs.items()
            if name != "other"
        }


def _path_figures(path: path_method.PathResult) -> PathFigures:
    return PathFigures(path.estimate, path.residual, path.points, path.refused)


def _ranking(found: dict[str, dict[str, float]], path: path_method.PathResult | None) -> str:
    """Which figure calls sites worst.

    rescue comes last of the exact ones: all of a run's rescues share the one draw of rounding noise
    of the fully quantized model, and where the noise is chaotic it is most of what they measure.
    """
    for method in ("in_order", "alone"):
        if method in found:
            return method
    if path is not None and path.refused is None:
        return "path"
    return next((m for m in ("rescue", "first_order") if m in found), BY_MSE)
