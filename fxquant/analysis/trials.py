"""What would repair the worst sites: other choices at them, and all of them in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice

from fxquant.analysis.bench import Bench
from fxquant.analysis.calibrated import READ_TOKENS, Calibrated, calibration_inputs
from fxquant.analysis.counterfactuals import (
    Counterfactual,
    Recovery,
    choices,
    measure,
    recovery_counts,
)
from fxquant.analysis.effects import walk_to
from fxquant.analysis.lab import setting
from fxquant.analysis.local import LocalFigures
from fxquant.analysis.prediction import choice_count, seconds_of
from fxquant.analysis.sites import LinearSite, SimulatedSite, SiteMaker

CHOICES, RECOVERY = "other choices", "recovery"


def fitting(bench: Bench, worst: Sequence[SimulatedSite]) -> Sequence[SimulatedSite]:
    """As many of the worst sites as other choices may be tried at, at least one."""
    lab = bench.lab
    int8 = any(isinstance(each, LinearSite) and each.product8 is not None for each in worst)
    forwards = 1.0  # the walk, and what calibration data are read
    for index, each in enumerate(worst):
        coded = isinstance(each, LinearSite) and each.quantizer is not None
        forwards += (1 + choice_count(each.site, coded)) * lab.share_behind(each.node)
        whole = forwards + READ_TOKENS / lab.tokens_in
        seconds = seconds_of(CHOICES, whole, bench.forward_seconds, int8)
        if index and not bench.purse.holds(seconds):
            return worst[:index]
    return worst


def counterfactuals(
    bench: Bench,
    chosen: Sequence[SimulatedSite],
    local: Mapping[str, LocalFigures],
    loss_float: float,
    loss_quantized: float,
) -> tuple[Counterfactual, ...]:
    """Other choices at the sites, each with everything else as it is, most recovered first."""
    if not chosen:
        return ()
    maker = SiteMaker(bench.lab.gm)
    # Only a quantized input has choices that are made from calibration data.
    inputs = [s for s in chosen if isinstance(s, LinearSite) and s.quantizer is not None]
    batches = bench.batches
    if batches is None and inputs:
        batches = [{"input_ids": ids} for ids in bench.lab.windows]
        bench.notes.append(
            "smoothing factors come from the evaluation windows: no calibration data were given"
        )
    if batches is not None and inputs and bench.calibration_tokens > READ_TOKENS:
        bench.notes.append(
            "smoothing factors and ranges of changed inputs, among the other choices, come from "
            f"the first {READ_TOKENS} of {bench.calibration_tokens} calibration tokens"
        )
    with bench.lab.meter.measuring(CHOICES):
        seen = calibration_inputs(bench.lab, inputs, batches or ())
        found: list[Counterfactual] = []
        walk = walk_to(bench.lab, bench.sites, chosen)
        for each, cuts in bench.progress.over(walk, CHOICES, len(chosen)):
            found += measure(
                bench.lab,
                bench.sites,
                each,
                cuts,
                choices(each, local[each.path], maker, seen.get(each.path, Calibrated())),
                {"float": bench.without(each, cuts)},
                loss_float,
                loss_quantized,
                bench.remember(f"choice {each.path}"),
            )
    return tuple(sorted(found, key=lambda each: -each.recovered))


def recovery(
    bench: Bench, order: Sequence[str], ranked: int, loss_float: float, loss_quantized: float
) -> tuple[Recovery, ...]:
    """The first sites of ``order`` in float together, as far as they are ranked; the ends are
    known."""
    counts = recovery_counts(len(order), ranked)
    known = {0: loss_quantized, len(order): loss_float}
    found = []
    with bench.lab.meter.measuring(RECOVERY):
        for count in bench.progress.over(counts, RECOVERY, len(counts)):
            fixed = set(islice(order, count))
            under = setting(each for each in bench.sites if each.path not in fixed)
            loss = known.get(count)
            if loss is None:
                measure = partial(bench.lab.loss, under)
                loss = bench.remember(RECOVERY)(",".join(sorted(fixed)), measure)
            found.append(Recovery(count, loss - loss_float))
    return tuple(found)
