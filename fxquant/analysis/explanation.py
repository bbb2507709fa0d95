"""``explain``: Δloss taken apart, by exact methods on one float graph."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.analysis import path as path_method
from fxquant.analysis.causes import causes_of, present_causes
from fxquant.analysis.channels import Decode, group_shares, worst_channels, worst_tokens
from fxquant.analysis.counterfactuals import (
    Counterfactual,
    Recovery,
    calibration_inputs,
    choices,
    measure,
    recovery_counts,
)
from fxquant.analysis.effects import EFFECTS, Group, as_effects, effects, first_site, walk_to
from fxquant.analysis.inputs import Windows, as_batches, as_windows, observed_graph, restricted
from fxquant.analysis.lab import FLOAT_SETTING, Lab, setting
from fxquant.analysis.local import LocalFigures, local_figures
from fxquant.analysis.parts import Cause
from fxquant.analysis.results import (
    Explanation,
    GroupFigures,
    MethodCost,
    PathFigures,
    SiteFigures,
    rank_value,
)
from fxquant.analysis.sites import Place, SimulatedSite, SiteMaker, places, simulated_sites
from fxquant.analysis.store import Store, fingerprint
from fxquant.analysis.validation import Agreement, agreement
from fxquant.batches import Batches
from fxquant.errors import SchemeError
from fxquant.graph import info
from fxquant.loss import token_nll
from fxquant.schemes import Scheme, as_scheme
from fxquant.tracing import trace

GROUPED = tuple(f"{effect}:{by}" for effect in EFFECTS for by in ("kinds", "blocks"))
METHODS = (*EFFECTS, *GROUPED, "causes", "path", "first_order")
DEFAULT_METHODS = ("in_order", "causes", "rescue", "path")


def explain(
    model: PreTrainedModel | GraphModule,
    scheme: str | Scheme,
    *,
    calibration: Batches | None = None,
    data: Windows | None = None,
    methods: Sequence[str] = DEFAULT_METHODS,
    sites: str | None = None,
    progress: bool | None = None,
    worst: int = 3,
    tokenizer: Tokenizer | None = None,
    output: Path | None = None,
) -> Explanation:
    """Take the loss difference of a scheme apart: where it enters, why, and what would repair it.

    Args:
        model: a Hugging Face causal LM or a float graph from ``trace``; never modified.
        scheme: text or a Scheme.
        calibration: as for ``convert``; needed by static schemes.
        data: windows to measure the loss on: LongTensor [N, L], or several [b, L]; each is run by
            itself, and a dynamic range is of one of them. None: the calibration batches' tokens.
        methods: of "alone", "rescue", "in_order" (each also with ":kinds" or ":blocks", where the
            sites of a group are changed together, which is cheaper), "causes", "path" and
            "first_order". The local figures of every site are always there.
        sites: a glob that restricts the scheme to the sites it covers.
        progress: bars; None: where the output is a terminal.
        worst: at how many of the worst sites other choices are tried and causes are measured; 0
            also leaves out the recovery curve.
        tokenizer: to show tokens as text and tell delimiters apart.
        output: a folder where finished losses are kept; the same call goes on from them.

    Raises SchemeError (unknown method, nothing to quantize, ``sites`` covers nothing), DataError,
    CalibrationError and what ``convert`` raises, before any measurement.
    """
    scheme = as_scheme(scheme)
    _check(methods, worst)
    graph = model if isinstance(model, GraphModule) else trace(model)
    batches = as_batches(calibration, graph)
    notes: list[str] = []
    if data is None and batches is not None:
        data = [batch["input_ids"] for batch in batches]
        notes.append("the loss is measured on the calibration batches: no other data were given")
    windows = as_windows(data, graph)
    narrowed = restricted(scheme, sites, graph)
    observed = observed_graph(graph, narrowed, batches, bool(progress))
    study = _Study(
        lab=Lab(observed, windows),
        sites=simulated_sites(observed, narrowed),
        batches=batches,
        store=Store(output, fingerprint(observed, windows, str(narrowed))),
        hidden=None if progress is None else not progress,
        decode=None if tokenizer is None else lambda token: str(tokenizer.decode([token])),
        notes=notes,
    )
    unrepaired = Lab(graph, windows).loss(FLOAT_SETTING) if scheme.repairs else None
    return study.run(tuple(dict.fromkeys(methods)), worst, str(scheme), sites, unrepaired)


def _check(methods: Sequence[str], worst: int) -> None:
    unknown = [method for method in methods if method not in METHODS]
    if isinstance(methods, str) or unknown:
        raise SchemeError(f"unknown method {unknown or methods}: known are {', '.join(METHODS)}")
    if worst < 0:
        raise SchemeError(f"worst must be at least 0, got {worst}")


@dataclass
class _Study:
    """One run of explain: the lab and what every method needs."""

    lab: Lab
    sites: tuple[SimulatedSite, ...]
    batches: list[dict[str, Tensor]] | None
    store: Store
    hidden: bool | None
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
        self.forward_seconds = _plain_forward_seconds(lab)
        self.loss_float = lab.loss(FLOAT_SETTING)
        with lab.meter.measuring("local figures"):
            self.local, self.loss_quantized = local_figures(lab, self.sites)
        found: dict[str, dict[str, float]] = {}
        for method in methods:
            if method in EFFECTS or method in GROUPED:
                found[method] = self._effects(method)
        if "first_order" in methods:
            with lab.meter.measuring("first_order"):
                found["first_order"] = path_method.first_order(lab, self.sites)
        path = self._path() if "path" in methods else None
        causes = self._causes() if "causes" in methods else {}
        ranking = _ranking(found, path)
        figures = self._site_figures(found, path)
        order = sorted(figures, key=lambda path: -rank_value(figures[path], ranking))
        chosen = [each for each in self.sites if each.path in order[:worst]]
        own = self._own_causes(chosen) if "causes" in methods else {}
        for name, values in own.items():
            figures[name] = _with_causes(figures[name], values)
        counterfactuals = self._counterfactuals(chosen)
        recovery = self._recovery(order) if worst else ()
        return Explanation(
            model=info(lab.gm).model,
            scheme=scheme,
            sites_pattern=pattern,
            windows=(sum(len(ids) for ids in lab.windows), lab.windows[0].shape[1]),
            loss_unrepaired=self.loss_float if unrepaired is None else unrepaired,
            loss_float=self.loss_float,
            loss_quantized=self.loss_quantized,
            causes=causes.get("model"),
            sites=tuple(figures[each.path] for each in self.sites),
            kinds=self._groups("kinds", figures, found, causes),
            blocks=self._groups("blocks", figures, found, {}),
            path=None
            if path is None
            else PathFigures(path.estimate, path.residual, path.points, path.refused),
            counterfactuals=counterfactuals,
            recovery=recovery,
            validation=self._validation(found, path),
            ranking=ranking,
            forward_seconds=self.forward_seconds,
            costs=self._costs(),
            notes=tuple(self.notes),
        )

    def _bar(self, steps: Iterable[Any], name: str, total: int) -> Iterable[Any]:
        return tqdm(steps, name, total, leave=False, disable=self.hidden)

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
        known = self.store.under(f"{method} ")
        losses: dict[str, float] = {}
        with self.lab.meter.measuring(method):
            trials = effects(self.lab, effect, groups, self.sites, known)  # type: ignore[arg-type]
            for name, loss in self._bar(trials, method, len(groups)):
                self.store.put(f"{method} {name}", loss)
                losses[name] = loss
        return as_effects(effect, losses, self.loss_float, self.loss_quantized)  # type: ignore[arg-type]

    def _path(self) -> path_method.PathResult:
        with self.lab.meter.measuring("path"):
            bar = tqdm(total=len(self.lab.windows), desc="path", leave=False, disable=self.hidden)
            with bar:
                return path_method.integrate(self.lab, self.sites, bar.update)

    # Causes ---------------------------------------------------------------------------------------

    def _causes(self) -> dict[str, dict[Cause, float]]:
        """Of the whole model, under "model", and of each kind by itself."""
        parts: dict[str, Sequence[SimulatedSite]] = {"model": self.sites}
        kinds = self._members("kinds")
        # A single kind is the whole model.
        parts.update(kinds if len(kinds) > 1 else {})
        found: dict[str, dict[Cause, float]] = {}
        with self.lab.meter.measuring("causes"):
            for name, group in self._bar(parts.items(), "causes", len(parts)):
                cuts = self.lab.advance(
                    self.lab.start(), first_site(self.lab, group).node, FLOAT_SETTING
                )
                found[name] = causes_of(
                    self.lab, group, cuts=cuts, remember=self._remember(f"causes {name}")
                )
        if len(kinds) == 1:
            found[next(iter(kinds))] = found["model"]
        return found

    def _own_causes(self, chosen: Sequence[SimulatedSite]) -> dict[str, dict[Cause, float]]:
        found = {}
        with self.lab.meter.measuring("causes of the worst sites"):
            for each, cuts in walk_to(self.lab, self.sites, chosen):
                if len(present_causes([each])) > 1:
                    found[each.path] = causes_of(
                        self.lab,
                        [each],
                        around=self.sites,
                        cuts=cuts,
                        remember=self._remember(f"causes of {each.path}"),
                    )
        return found

    def _remember(self, prefix: str) -> Any:
        return lambda name, compute: self.store.remember(f"{prefix} {name}", compute)

    # Repairs --------------------------------------------------------------------------------------

    def _counterfactuals(self, chosen: Sequence[SimulatedSite]) -> tuple[Counterfactual, ...]:
        if not chosen:
            return ()
        maker = SiteMaker(self.lab.gm)
        batches = self.batches
        if batches is None:
            batches = [{"input_ids": ids} for ids in self.lab.windows]
            self.notes.append(
                "smoothing factors come from the evaluation windows: no calibration data were given"
            )
        with self.lab.meter.measuring("other choices"):
            seen = calibration_inputs(self.lab, chosen, batches)
            found: list[Counterfactual] = []
            walk = walk_to(self.lab, self.sites, chosen)
            for each, cuts in self._bar(walk, "other choices", len(chosen)):
                found += measure(
                    self.lab,
                    self.sites,
                    each,
                    cuts,
                    choices(each, self.local[each.path], maker, seen[each.path]),
                    self.loss_float,
                    self.loss_quantized,
                    self._remember(f"choice {each.path}"),
                )
        return tuple(sorted(found, key=lambda each: -each.recovered))

    def _recovery(self, order: Sequence[str]) -> tuple[Recovery, ...]:
        found = []
        counts = recovery_counts(len(self.sites))
        with self.lab.meter.measuring("recovery"):
            for count in self._bar(counts, "recovery", len(counts)):
                fixed = set(order[:count])
                under = setting(each for each in self.sites if each.path not in fixed)
                name = f"recovery {','.join(sorted(fixed))}"
                loss = self.store.remember(name, lambda under=under: self.lab.loss(under))  # type: ignore[misc]
                found.append(Recovery(count, loss - self.loss_float))
        return tuple(found)

    # Figures --------------------------------------------------------------------------------------

    def _site_figures(
        self, found: dict[str, dict[str, float]], path: path_method.PathResult | None
    ) -> dict[str, SiteFigures]:
        trusted = path.sites if path is not None and path.refused is None else None
        figures = {}
        for each in self.sites:
            effects_here = {
                method: values[each.path]
                for method, values in found.items()
                if method not in GROUPED
            }
            figures[each.path] = self._figures_of(
                each.path,
                self.where[each.path],
                effects_here,
                self.local[each.path],
                None if trusted is None else trusted[each.path],
            )
        return figures

    def _figures_of(
        self,
        path: str,
        place: Place,
        effects_here: dict[str, float],
        local: LocalFigures,
        along: path_method.PathSite | None,
    ) -> SiteFigures:
        windows = self.lab.windows
        return SiteFigures(
            site=path,
            kind=place.kind,
            block=place.block,
            effects=effects_here,
            path=None if along is None else dict(along.causes),
            causes=None,
            energy=dict(local.energy),
            rounding_floor=local.floor,
            range_mismatch=local.range_mismatch,
            sqnr_db=local.sqnr_db,
            mse=local.mse,
            share_clipped=local.share_clipped,
            share_flushed=local.share_flushed,
            worst_channels=worst_channels(local, along),
            worst_tokens=worst_tokens(local, along, windows, self.decode),
            token_groups=group_shares(local, windows, self.decode),
        )

    def _groups(
        self,
        by: str,
        figures: dict[str, SiteFigures],
        found: dict[str, dict[str, float]],
        causes: dict[str, dict[Cause, float]],
    ) -> tuple[GroupFigures, ...]:
        rows = []
        for name, members in self._members(by).items():
            inside = [figures[each.path] for each in members]
            sums = {
                method: sum(each.effects[method] for each in inside) for method in inside[0].effects
            }
            if inside[0].path is not None:
                sums["path"] = sum(sum((each.path or {}).values()) for each in inside)
            measured = {
                method: values[name] for method, values in found.items() if method.endswith(by)
            }
            rows.append(GroupFigures(name, len(members), sums, measured, causes.get(name)))
        return tuple(rows)

    def _validation(
        self, found: dict[str, dict[str, float]], path: path_method.PathResult | None
    ) -> tuple[Agreement, ...]:
        """Each cheap figure, and each exact effect, against the exact effects that were run."""
        if len(self.sites) < 3:
            return ()
        cheap: dict[str, dict[str, float]] = {
            "local SQNR": {name: -local.sqnr_db for name, local in self.local.items()},
            "local MSE": {name: local.mse for name, local in self.local.items()},
        }
        nats = {name: values for name, values in found.items() if name not in GROUPED}
        if path is not None:
            refused = " (refused)" if path.refused else ""
            nats[f"path{refused}"] = {name: site.total for name, site in path.sites.items()}
        rows = []
        exact = [effect for effect in EFFECTS if effect in found]
        for against in exact:
            for figure, values in {**cheap, **nats}.items():
                if figure not in exact or exact.index(figure) < exact.index(against):
                    rows.append(
                        agreement(figure, values, against, found[against], in_nats=figure in nats)
                    )
        return tuple(rows)

    def _costs(self) -> dict[str, MethodCost]:
        return {
            name: MethodCost(cost.forwards, cost.seconds, cost.seconds / self.forward_seconds)
            for name, cost in self.lab.meter.costs.items()
            if name != "other"
        }


def _with_causes(figures: SiteFigures, causes: dict[Cause, float]) -> SiteFigures:
    from dataclasses import replace

    return replace(figures, causes=causes)


def _ranking(found: dict[str, dict[str, float]], path: path_method.PathResult | None) -> str:
    """Which figure calls sites worst: exact ones first, rescue before all."""
    for method in ("rescue", "in_order", "alone"):
        if method in found:
            return method
    if path is not None and path.refused is None:
        return "path"
    return "first_order" if "first_order" in found else "local MSE"


@torch.no_grad()
def _plain_forward_seconds(lab: Lab) -> float:
    """Median seconds of a float forward with its loss over all windows, the unit of cost."""
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        for ids in lab.windows:
            token_nll(lab.executor.run(input_ids=ids), ids)
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])
