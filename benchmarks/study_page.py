"""docs/why_static_fails.md as text, from the data of a run: every number and sentence follows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tabulate import tabulate

CAUSES = ("weights", "clipping", "rounding")
STATIC, ABSMAX, DYNAMIC = "w8a8-static", "w8a8-static:absmax", "w8a8-dynamic"
Data = dict[str, Any]


def page(data: Data) -> str:
    """The whole page."""
    return "\n\n".join(part.strip() for part in _parts(data)) + "\n"


def _parts(data: Data) -> Iterator[str]:
    yield "# Why static quantization fails, measured"
    yield (
        "Written by `python -m benchmarks.why_static_fails` from `benchmarks/why_static_fails.json`"
        " (`--render` writes it again without measuring). The claim under test is that of the "
        "reference write-up: *low clipping is not low error; scale mismatch dominates, not "
        "saturation*. Each figure below is a loss difference in nats a token that was measured; "
        "`weights`, `clipping` and `rounding` are exact Shapley values of the three parts into "
        "which a site's error splits, so they sum to Δloss. A range that is too wide shows as "
        "rounding, one that is too narrow as clipping."
    )
    yield "\n".join(f"- **{each['name']}**: {_verdict(each)}" for each in data["subjects"])
    yield "## Causes"
    for subject in data["subjects"]:
        yield f"{_where(subject)}\n\n{_cause_table(subject)}"
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
                yield f"{subject['name']}, `{scheme}`:\n\n{_validation(found)}"
    yield _trust(data)
    yield "## What it cost"
    yield _costs(data)
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    yield (
        f"Text: {data['text']} ({data['text_hash'][:23]}); float32 on CPU, {data['machine']}; "
        f"{versions}. One text and few windows: other windows give other figures."
    )


def _where(subject: Data) -> str:
    text = (
        f"{subject['name']} (`{subject['model']}`, {subject['revision'][:23]}), "
        f"{subject['windows']} windows of {subject['length']} tokens, "
        f"{subject['calibration_windows']} to calibrate"
    )
    if subject["planted"]:
        text += f"; {len(subject['planted'])} outliers planted that leave its float function alone"
    return text + ":"


def collapse(subject: Data) -> str:
    """The static scheme that loses most."""
    schemes = subject["schemes"]
    static = (name for name in schemes if "static" in name)
    return str(max(static, key=lambda name: float(schemes[name]["delta_loss"])))


def _main_cause(found: Data) -> tuple[str, float]:
    """The cause with the largest value, and its share of Δloss."""
    cause = max(CAUSES, key=lambda name: found["causes"][name])
    total = found["delta_loss"]
    return cause, found["causes"][cause] / total if total > 0 else float("nan")


def _verdict(subject: Data) -> str:
    static, absmax = (subject["schemes"][name] for name in (STATIC, ABSMAX))
    worst = collapse(subject)
    found = subject["schemes"][worst]
    cause, share = _main_cause(found)
    wide, wide_share = _main_cause(absmax)
    holds = "holds" if cause == "rounding" else "does not hold"
    text = (
        f"the worst static scheme, `{worst}`, loses {found['delta_loss']:+.4f}, of which "
        f"{share:.0%} is {cause}: as a statement about this collapse the claim {holds}. "
        f"With the range at absmax {absmax['delta_loss']:+.4f} remain, {wide_share:.0%} of it "
        f"{wide}"
    )
    if worst != STATIC:
        text += f"; p99.9 loses {static['delta_loss']:+.4f}"
    return text + "."


def _cause_table(subject: Data) -> str:
    rows = []
    for scheme, found in subject["schemes"].items():
        inputs = [site["share_clipped"] for site in found["sites"]]
        path = found["path"]
        rows.append(
            [
                scheme,
                f"{found['delta_loss']:+.4f}",
                *(f"{found['causes'][cause]:+.4f}" for cause in CAUSES),
                f"{sum(inputs) / len(inputs):.4%}",
                "refused" if path["refused"] else f"{path['residual']:+.4f}",
            ]
        )
    headers = ["scheme", "Δloss", *CAUSES, "clipped, mean of sites", "path residual"]
    return _table(rows, headers)


def _carrying(found: Data, share: float) -> int:
    """The fewest worst sites whose positive rescues make up ``share`` of all positive ones."""
    values = [max(site["rescue"], 0.0) for site in found["sites"]]
    target, total = share * sum(values), 0.0
    for index, value in enumerate(values):
        total += value
        if total >= target:
            return index + 1
    return len(values)


def _places(subject: Data, scheme: str) -> Iterator[str]:
    found = subject["schemes"][scheme]
    count = len(found["sites"])
    yield (
        f"{subject['name']}, `{scheme}`: {_carrying(found, 0.5)} of {count} sites carry half of "
        f"what rescuing sites one at a time gives back, {_carrying(found, 0.9)} carry 90%. The "
        "worst:"
    )
    rows = []
    for site in found["sites"][:5]:
        channel, token = site["worst_channels"][0], site["worst_tokens"][0]
        rows.append(
            [
                site["site"],
                f"{site['rescue']:+.4f}",
                site["cause"],
                f"{site['share_clipped']:.3%}",
                f"{channel['channel']} ({channel['blame']:.0%}, max \\|x\\| {channel['peak']:.3g}, "
                f"{channel['peak_over_median']:.0f}x the median)",
                f"`{token['text']!r}` at {token['position']} ({token['blame']:.0%})",
                f"{site['token_groups']['first']:.0%}",
            ]
        )
    headers = ["site", "rescue", "cause", "clipped", "channel most to blame"]
    yield _table(rows, [*headers, "token most to blame", "error energy at first tokens"])


def _repairs(subject: Data, scheme: str) -> str:
    found = subject["schemes"][scheme]
    best: dict[str, Data] = {}
    for each in found["counterfactuals"]:
        known = best.get(each["site"])
        if each["choice"] != "float" and (known is None or each["recovered"] > known["recovered"]):
            best[each["site"]] = each
    rows = [
        [site["site"], f"{site['rescue']:+.4f}", other["choice"], f"{other['recovered']:+.4f}"]
        for site in found["sites"]
        if (other := best.get(site["site"])) is not None
    ]
    curve = ", ".join(f"{s['fixed']}: {s['delta_loss']:+.4f}" for s in found["recovery"])
    table = _table(rows, ["site", "in float", "best other choice", "recovers"])
    return (
        f"{subject['name']}, `{scheme}` ({found['delta_loss']:+.4f}): one site changed, the rest "
        f"quantized as it was:\n\n{table}\n\nΔloss with the worst n sites in float, {curve}."
    )


def _validation(found: Data) -> str:
    rows = [
        [
            each["figure"],
            each["against"],
            "-" if each["rank_correlation"] is None else f"{each['rank_correlation']:.2f}",
            f"{each['top']:.0%}",
            "" if each["error"] is None else f"{each['error']:.2f}",
        ]
        for each in found["validation"]
        if each["against"] in ("alone", "rescue")
    ]
    return _table(rows, ["figure", "against", "rank correlation", "same worst 8", "error"])


def _trust(data: Data) -> str:
    """The mean rank correlation of each cheap figure over all tables above."""
    values: dict[tuple[str, str], list[float]] = {}
    for subject in data["subjects"]:
        for found in subject["schemes"].values():
            for each in found["validation"] if "alone" in found["costs"] else ():
                cheap = each["figure"] in ("local SQNR", "local MSE", "first_order", "path")
                if cheap and each["rank_correlation"] is not None:
                    key = (each["figure"], each["against"])
                    values.setdefault(key, []).append(each["rank_correlation"])
    rows = [
        [figure, against, len(found), f"{sum(found) / len(found):.2f}", f"{min(found):.2f}"]
        for (figure, against), found in values.items()
        if against in ("alone", "rescue")
    ]
    table = _table(rows, ["figure", "against", "runs", "mean rank correlation", "least"])
    return f"Over all of these runs (path only where it was presented):\n\n{table}"


def _costs(data: Data) -> str:
    rows = []
    for subject in data["subjects"]:
        for scheme, found in subject["schemes"].items():
            sites = len(found["sites"])
            for name, goal in (("in_order", 0.6 * sites), ("path", 30.0)):
                if name in found["costs"]:
                    cost = found["costs"][name]
                    rows.append(
                        [
                            subject["name"],
                            scheme,
                            f"{name} (resumed)" if cost.get("partial") else name,
                            f"{cost['forwards']:.1f}",
                            f"{cost['measured_forwards']:.1f}",
                            f"{goal:.0f}",
                            f"{cost['seconds']:.0f}",
                        ]
                    )
    table = _table(
        rows, ["model", "scheme", "method", "forwards, by nodes", "by time", "goal", "seconds"]
    )
    resumed = any(
        cost.get("partial")
        for subject in data["subjects"]
        for found in subject["schemes"].values()
        for cost in found["costs"].values()
    )
    if resumed:
        table += "\n\nResumed: only what was run again is counted."
    return (
        "In forwards of the float model over the same windows; the goals are 0.6 forwards a site "
        f"for `in_order` and 30 for `path`.\n\n{table}"
    )


def _table(rows: list[list[Any]], headers: list[str]) -> str:
    return str(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
