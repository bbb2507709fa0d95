"""docs/why_static_fails.md as text, from the data of a run: every number and sentence follows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from statistics import mean, median

from benchmarks.causes_found import causes_found
from benchmarks.study_side import side_by_side
from benchmarks.study_trust import Data, costs, rescues, table_of, trust, validation
from benchmarks.weight_grids import weights_past
from fxquant.ir.calibration import version_words
from fxquant.ir.counted import counted

_NUMBERS = {3: "three", 4: "four"}
STATIC, ABSMAX, DYNAMIC = "w8a8-static", "w8a8-static:absmax", "w8a8-dynamic"
NOTICED = 0.05  # nats a token: a loss that a user would call an error


def page(data: Data, beside: Data) -> str:
    """The whole page; ``beside``: what benchmarks.side_by_side measured."""
    return "\n\n".join(part.strip() for part in _parts(data, beside)) + "\n"


def _parts(data: Data, beside: Data) -> Iterator[str]:
    causes = causes_of(data["subjects"])
    names = [f"`{cause}`" for cause in causes]
    yield "# Why static quantization fails, measured"
    yield (
        "Written by `python -m benchmarks.why_static_fails` from `benchmarks/why_static_fails.json`"
        " (`--render` writes it again without measuring). The claim under test is that of the "
        "reference write-up: *low clipping is not low error; scale mismatch dominates, not "
        "saturation*. Each figure below is a loss difference in nats a token that was measured; "
        f"{', '.join(names[:-1])} and {names[-1]} are exact Shapley values of the "
        f"{_NUMBERS[len(causes)]} parts into "
        "which a site's error splits, so they sum to Δloss. A range that is too wide shows as "
        "rounding, one that is too narrow as clipping. Whether rounding is a fault of the scale is "
        "asked of the best range: what the range with the least error, of the same granularity and "
        "bits, would leave of the error's energy."
    )
    yield "\n".join(f"- **{each['name']}**: {_verdict(each)}" for each in data["subjects"])
    yield "## Causes"
    for subject in data["subjects"]:
        yield f"{_where(subject)}\n\n{_cause_table(subject, causes)}"
    yield "![cause bars](images/causes.png)"
    yield "![the range drawn into a histogram of activations](images/histogram.png)"
    yield "## Where: sites, channels, tokens"
    yield (
        "A channel or token is to blame for its own clipping, and for rounding by how far it "
        "stretches the range ([explaining.md](explaining.md))."
    )
    for subject in data["subjects"]:
        for scheme in (collapse(subject), DYNAMIC):
            yield from _places(subject, scheme)
    yield "![effect by block and kind](images/heatmap.png)"
    yield "## What recovers it"
    for subject in data["subjects"]:
        for scheme in (collapse(subject), DYNAMIC):
            yield _repairs(subject, scheme)
    yield "![recovery curves](images/recovery.png)"
    yield from side_by_side(beside)
    yield "## Which cheap figure can be trusted"
    yield (
        "Each figure against the exact effect of every site: Spearman's rank correlation, the "
        "share of the eight worst sites that both name, and the sum of absolute errors over the "
        "sum of absolute effects (figures in nats only). `path (refused)` had not converged and is "
        "not presented in reports; it stands here to show what it would have been worth."
    )
    for subject in data["subjects"]:
        for scheme, found in subject["schemes"].items():
            if "alone" in found["costs"]:
                yield f"{subject['name']}, `{scheme}`:\n\n{validation(found)}"
                if "rescue" in found["costs"]:
                    yield rescues(found)
    yield trust(data)
    yield "## What it cost"
    yield costs(data)
    versions = version_words(data["versions"])
    yield (
        f"Text: {data['text']} ({data['text_hash'][:23]}), windows drawn with seed 0; float32 on "
        f"CPU, {data['machine']}, shared with other work; "
        f"{versions}. One text and few windows: other windows give other figures. int8 and E4M3 "
        "on the same ranges have a setting of their own, which stands there."
    )


def _where(subject: Data) -> str:
    text = (
        f"{subject['name']} (`{subject['model']}`, {subject['revision'][:23]}), "
        f"{counted(subject['windows'], 'window')} of {subject['length']} tokens, "
        f"{subject['calibration_windows']} to calibrate"
    )
    if subject["planted"]:
        text += f"; {len(subject['planted'])} outliers planted that leave its float function alone"
    past = weights_past(subject["model"], subject["revision"])
    return text + (f"; weights {past}:" if past else ":")


def collapse(subject: Data) -> str:
    """The static scheme that loses most."""
    schemes = subject["schemes"]
    static = (name for name in schemes if "static" in name)
    return str(max(static, key=lambda name: float(schemes[name]["delta_loss"])))


def causes_of(subjects: Iterable[Data]) -> tuple[str, ...]:
    """The causes that any scheme of ``subjects`` has, in their usual order."""
    return causes_found(
        found["causes"] for subject in subjects for found in subject["schemes"].values()
    )


def _main_cause(found: Data) -> tuple[str, float]:
    """The cause with the largest value, and its share of Δloss."""
    cause = max(found["causes"], key=lambda name: float(found["causes"][name]))
    total = found["delta_loss"]
    return cause, float(found["causes"][cause] / total) if total > 0 else math.nan


def _clipped(found: Data) -> float:
    """The mean over sites of the share of inputs that a range cuts."""
    return float(mean(site["share_clipped"] for site in found["sites"]))


def _best_range(found: Data) -> float:
    """What the best range of the same granularity would leave of the input's error: the median
    over sites of the floor over clipping's and rounding's energies; nan without such an error."""
    shares = [
        site["rounding_floor"] / error
        for site in found["sites"]
        if (error := site["energy"]["clipping"] + site["energy"]["rounding"]) > 0
    ]
    return median(shares) if shares else math.nan


def _verdict(subject: Data) -> str:
    absmax, worst = subject["schemes"][ABSMAX], collapse(subject)
    found = subject["schemes"][worst]
    cause, share = _main_cause(found)
    wide, wide_share = _main_cause(absmax)
    low = absmax["delta_loss"] > NOTICED or (
        found["delta_loss"] > NOTICED and _clipped(found) < 0.01
    )
    mismatch = cause == "rounding" and _best_range(found) < 0.5
    text = (
        f"the worst static scheme, `{worst}`, loses {found['delta_loss']:+.4f} with "
        f"{_clipped(found):.3%} of its inputs clipped (mean of sites), and `{ABSMAX}` "
        f"{absmax['delta_loss']:+.4f} with {_clipped(absmax):.3%}. That low clipping is not low "
        f"error {_holds(low)}. In the worst scheme {share:.0%} of the loss "
        f"is {cause}"
    )
    if cause == "clipping":
        few = ": few values are cut, and they are the ones that matter"
        text += few if _clipped(found) < 0.01 else ""
        text += ". That scale mismatch dominates and not saturation does not hold there"
    else:
        text += f". That scale mismatch dominates and not saturation {_holds(mismatch)} there"
    text += (
        f". With the range at absmax {wide_share:.0%} is {wide}, and the best range of the same "
        f"granularity would leave {_best_range(absmax):.0%} of the input's error at the median "
        f"site: "
    )
    if _best_range(absmax) < 0.5:
        return text + "there the scale is at fault."
    return text + "what is at fault there is not the scale but one scale for a whole tensor."


def _holds(claim: bool) -> str:
    return "holds" if claim else "does not hold"


_CLIPPED = (
    "Clipped: the share of a site's input elements, on these windows, beyond its range by more "
    "than half a step."
)


def _cause_table(subject: Data, causes: tuple[str, ...]) -> str:
    rows = []
    for scheme, found in subject["schemes"].items():
        best = _best_range(found)
        path = found["path"]
        rows.append(
            [
                scheme,
                f"{found['delta_loss']:+.4f}",
                *(
                    f"{found['causes'][cause]:+.4f}" if cause in found["causes"] else ""
                    for cause in causes
                ),
                f"{_clipped(found):.4%}",
                "" if math.isnan(best) else f"{best:.0%}",
                "refused" if path["refused"] else f"{path['residual']:+.4f}",
            ]
        )
    headers = ["scheme", "Δloss", *causes, "clipped, mean of sites", "best range leaves"]
    return f"{table_of(rows, [*headers, 'path residual'])}\n\n{_CLIPPED}"


def effect(found: Data, site: Data) -> float:
    """The effect by which the run calls sites worst, in nats."""
    value = site[found["ranking"]]
    return float(sum(value.values()) if isinstance(value, dict) else value)


def _carrying(found: Data, share: float) -> int:
    """The fewest worst sites whose positive effects make up ``share`` of all positive ones."""
    values = [max(effect(found, site), 0.0) for site in found["sites"]]
    target, total = share * sum(values), 0.0
    for index, value in enumerate(values):
        total += value
        if total >= target:
            return index + 1
    return len(values)


def _places(subject: Data, scheme: str) -> Iterator[str]:
    found = subject["schemes"][scheme]
    count, ranking = len(found["sites"]), found["ranking"]
    detailed = [site for site in found["sites"] if site.get("worst_channels")]
    alone = [site for site in detailed if site["worst_channels"][0]["blame"] > 0.5]
    channels = {site["worst_channels"][0]["channel"] for site in alone}
    tokens = sum(site["worst_tokens"][0]["blame"] > 0.5 for site in detailed)
    yield (
        f"{subject['name']}, `{scheme}`: by `{ranking}`, {_carrying(found, 0.5)} of {count} sites "
        f"carry half of all positive effects, {_carrying(found, 0.9)} carry 90%. At {len(alone)} "
        f"of the {len(detailed)} worst sites one channel has more than half of the blame (channels "
        f"{', '.join(map(str, sorted(channels))) or 'none'}), at {tokens} one token has. The worst:"
    )
    rows = []
    for site in found["sites"][:5]:
        channel, token = site["worst_channels"][0], site["worst_tokens"][0]
        text = repr(token["text"]).replace("|", "\\|")
        rows.append(
            [
                site["site"],
                f"{effect(found, site):+.4f}",
                site["cause"],
                f"{site['share_clipped']:.3%}",
                f"{channel['channel']} ({channel['blame']:.0%}, max \\|x\\| {channel['peak']:.3g}, "
                f"{channel['peak_over_median']:.0f}x the median)",
                f"`{text}` at {token['position']} ({token['blame']:.0%})",
                f"{site['token_groups']['first']:.0%}",
            ]
        )
    headers = ["site", ranking, "cause", "clipped", "channel most to blame"]
    yield table_of(rows, [*headers, "token most to blame", "error energy at first tokens"])
    kinds = (
        f"{kind['name']} {kind['sums'][ranking]:+.4f} ({kind['sites']} sites)"
        for kind in found["kinds"]
    )
    yield f"Summed over kinds of site: {', '.join(kinds)}."


def _repairs(subject: Data, scheme: str) -> str:
    found = subject["schemes"][scheme]
    floating: dict[str, float] = {}
    best: dict[str, Data] = {}
    for each in found["counterfactuals"]:
        site, known = each["site"], best.get(each["site"])
        if each["choice"] == "float":
            floating[site] = each["recovered"]
        elif known is None or each["recovered"] > known["recovered"]:
            best[site] = each
    rows = [
        [site["site"], f"{floating[name]:+.4f}", other["choice"], f"{other['recovered']:+.4f}"]
        for site in found["sites"]
        if (other := best.get(name := site["site"])) is not None
    ]
    curve = ", ".join(f"{s['fixed']}: {s['delta_loss']:+.4f}" for s in found["recovery"])
    table = table_of(rows, ["site", "float recovers", "best other choice", "recovers"])
    worst, *_ = found["sites"]
    if found["recovery"][1]["delta_loss"] > found["delta_loss"] + NOTICED:
        curve += (
            f". {worst['site']} alone in float makes it worse: the errors of the worst sites act "
            "on one another, and only several repaired together recover the loss"
        )
    return (
        f"{subject['name']}, `{scheme}` ({found['delta_loss']:+.4f}): one site changed, the rest "
        f"quantized as it was:\n\n{table}\n\nΔloss with the worst n sites in float, {curve}."
    )
