"""One run of explain: the lab, and every method on it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fxquant.analysis import path as path_method
from fxquant.analysis.bench import Bench
from fxquant.analysis.causes import causes_of, present_causes
from fxquant.analysis.channels import Decode
from fxquant.analysis.counterfactuals import Recovery
from fxquant.analysis.effects import (
    EFFECTS,
    GROUPED,
    TRIALS,
    WORST,
    By,
    Group,
    as_effects,
    effects,
    first_site,
    walk_to,
)
from fxquant.analysis.figures import Found, group_figures, site_figures, validate
from fxquant.analysis.lab import FLOAT_SETTING
from fxquant.analysis.local import local_figures
from fxquant.analysis.parts import EVERY_PART, Cause, Parts
from fxquant.analysis.prediction import seconds_of
from fxquant.analysis.report import DETAILED, Explanation
from fxquant.analysis.results import (
    BY_MSE,
    GroupFigures,
    MethodCost,
    PathFigures,
    SiteFigures,
    is_ranked,
    rank_value,
)
from fxquant.analysis.sites import LinearSite, SimulatedSite, places
from fxquant.analysis.trials import RECOVERY, counterfactuals, fitting, recovery
from fxquant.analysis.validation import shared_draw
from fxquant.analysis.worst_first import ALLOWANCE, Losses, steps
from fxquant.ir.graph import info

OWN_CAUSES = "causes of the worst sites"


@dataclass
class Study(Bench):
    """One run of explain: what every method needs. ``seconds``: that each step is expected to take,
    by its name; ``repaired``: whether the scheme changes the float graph; ``left_out``: what did
    not fit in the purse."""

    decode: Decode | None
    repaired: bool
    seconds: Mapping[str, float]
    left_out: list[str] = field(default_factory=list)

    def run(
        self,
        methods: tuple[str, ...],
        worst: int,
        scheme: str,
        pattern: str | None,
        unrepaired: float,
    ) -> Explanation:
        """``unrepaired``: the loss of the float graph without the scheme's repairs."""
        lab = self.lab
        self.where = places(lab.gm, self.sites)
        self.loss_float = lab.loss(FLOAT_SETTING) if self.repaired else unrepaired
        with lab.meter.measuring("local figures"), self.windows("local figures") as advance:
            self.local, self.loss_quantized = local_figures(lab, self.sites, advance)
        found = self._worst_first(max(worst, DETAILED)) if WORST in methods else {}
        singly = [m for m in methods if m in EFFECTS]
        found |= {m: self._effects(m) for m in singly}
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
        chosen = self._chosen(order[:worst])
        tried = counterfactuals(self, chosen, self.local, self.loss_float, self.loss_quantized)
        recovered = self._recovery(order, figures, ranking) if worst else ()
        grouped = [m for m in methods if m in GROUPED]
        found |= {m: self._effects(m) for m in grouped if self._fits(m)}
        own = self._own_causes(chosen) if "causes" in methods and chosen else {}
        figures.update({name: replace(figures[name], causes=own[name]) for name in own})
        return Explanation(
            model=info(lab.gm).model,
            scheme=scheme,
            sites_pattern=pattern,
            windows=(sum(map(len, lab.windows)), max(ids.shape[1] for ids in lab.windows)),
            shortest_window=min(ids.shape[1] for ids in lab.windows),
            loss_unrepaired=unrepaired,
            loss_float=self.loss_float,
            loss_quantized=self.loss_quantized,
            causes=causes.get("model"),
            sites=tuple(figures[each.path] for each in self.sites),
            kinds=self._groups("kinds", figures, found, causes),
            blocks=self._groups("blocks", figures, found, {}),
            path=None if path is None else _path_figures(path),
            counterfactuals=tried,
            recovery=recovered,
            validation=validate(self.local, found, path),
            ranking=ranking,
            forward_seconds=self.forward_seconds,
            costs=self._costs(),
            methods=tuple(m for m in methods if m not in self.left_out),
            left_out=tuple(self.left_out),
            time_limit=self.purse.seconds if math.isfinite(self.purse.seconds) else None,
            notes=tuple(self.notes),
        )

    # What fits in the purse -----------------------------------------------------------------------

    def _fits(self, step: str) -> bool:
        """Whether a step that may be left out is run; it is listed where it is not."""
        fits = self.purse.holds(self.seconds.get(step, 0.0))
        self.left_out += [] if fits else [step]
        return fits

    def _chosen(self, worst: Sequence[str]) -> list[SimulatedSite]:
        """The worst sites at which other choices are tried, in graph order."""
        by_path = {each.path: each for each in self.sites}
        kept = fitting(self, [by_path[path] for path in worst])
        if len(kept) < len(worst):
            rest = ", ".join(worst[len(kept) :])
            self.left_out.append(f"other choices at the next {len(worst) - len(kept)}: {rest}")
        return [each for each in self.sites if each in kept]

    def _recovery(
        self, order: Sequence[str], figures: dict[str, SiteFigures], ranking: str
    ) -> tuple[Recovery, ...]:
        ranked = sum(is_ranked(figures[path], ranking) for path in order)
        if not self._fits(RECOVERY):
            return ()
        return recovery(self, order, ranked, self.loss_float, self.loss_quantized)

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

    # Effects --------------------------------------------------------------------------------------

    def _members(self, by: By) -> dict[str, list[SimulatedSite]]:
        """Sites by kind or block; those outside the blocks form groups of their role."""
        groups: dict[str, list[SimulatedSite]] = {}
        for each in self.sites:
            place = self.where[each.path]
            name = place.kind if by == "kinds" or place.block is None else place.block
            groups.setdefault(name, []).append(each)
        return groups

    def _effects(self, method: str) -> dict[str, float]:
        trials = TRIALS[method]
        groups = [Group(each.path, (each,)) for each in self.sites]
        if trials.by is not None:
            members = self._members(trials.by)
            groups = [Group(name, tuple(sites)) for name, sites in members.items()]
        with self.lab.meter.measuring(method):
            found = effects(self.lab, trials.effect, groups, self.sites, self.remember(method))
            losses = dict(self.progress.over(found, method, len(groups)))
        return as_effects(trials.effect, losses, self.loss_float, self.loss_quantized)

    def _worst_first(self, wanted: int) -> dict[str, dict[str, float]]:
        """in_order of the worst blocks' sites, and of all blocks."""
        group_of = {
            each.path: name for name, sites in self._members("blocks").items() for each in sites
        }

        def over(losses: Losses, count: int, forwards: float) -> Losses:
            expected = seconds_of(WORST, forwards, self.forward_seconds)
            return self.progress.over(losses, WORST, count, expected)

        with self.lab.meter.measuring(WORST):
            found = steps(
                self.lab,
                self.sites,
                group_of,
                self.loss_float,
                self.remember("in_order"),
                over,
                wanted,
                ALLOWANCE,
            )
        return {"in_order": found.sites, "in_order:blocks": found.groups}

    def _path(self) -> path_method.PathResult:
        with self.lab.meter.measuring("path"), self.windows("path") as advance:
            return path_method.integrate(self.lab, self.sites, advance)

    # Causes ---------------------------------------------------------------------------------------

    def _model_causes(self) -> dict[Cause, float]:
        everything = EVERY_PART & frozenset(present_causes(self.sites))
        known: dict[Parts, float] = {frozenset(): self.loss_float, everything: self.loss_quantized}
        with self.lab.meter.measuring("causes"):
            return causes_of(
                self.lab, self.sites, known=known, remember=self.remember("causes model")
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
                    self.lab, group, cuts=cuts, remember=self.remember(f"causes {name}")
                )
        return found

    def _own_causes(self, chosen: Sequence[SimulatedSite]) -> dict[str, dict[Cause, float]]:
        chosen = [each for each in chosen if len(present_causes([each])) > 1]
        if not chosen or not self._fits(OWN_CAUSES):
            return {}
        found = {}
        with self.lab.meter.measuring(OWN_CAUSES):
            walk = walk_to(self.lab, self.sites, chosen)
            for each, cuts in self.progress.over(walk, OWN_CAUSES, len(chosen)):
                known: dict[Parts, float] = {
                    frozenset(): self.without(each, cuts),
                    EVERY_PART & frozenset(each.causes): self.loss_quantized,
                }
                # What was measured as a choice at the site is not measured again.
                float_weight = self.store.values.get(f"choice {each.path} float weight")
                whole = isinstance(each, LinearSite) and each.simulated.split is None
                if float_weight is not None and whole:
                    known[frozenset(each.causes) - {"weights"}] = float_weight
                found[each.path] = causes_of(
                    self.lab,
                    [each],
                    around=self.sites,
                    cuts=cuts,
                    known=known,
                    remember=self.remember(f"causes of {each.path}"),
                )
        return found

    def _groups(
        self,
        by: By,
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
