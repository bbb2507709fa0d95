"""Which cheap figure can be trusted and what methods cost: parts of docs/why_static_fails.md."""

from __future__ import annotations

from statistics import mean
from typing import Any

from tabulate import tabulate

from fxquant.analysis.validation import shared_draw

Data = dict[str, Any]


def table_of(rows: list[list[Any]], headers: list[str]) -> str:
    return str(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def validation(found: Data) -> str:
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
    large = sum(abs(site["alone"]) > 0.01 * abs(found["delta_loss"]) for site in found["sites"])
    table = table_of(rows, ["figure", "against", "rank correlation", "same worst 8", "error"])
    return (
        f"{table}\n\n{large} of {len(found['sites'])} sites have an `alone` above 1% of Δloss; "
        "the rank correlation counts the order of all others too."
    )


def rescues(found: Data) -> str:
    rescues = {site["site"]: site["rescue"] for site in found["sites"]}
    noisy = shared_draw(rescues, found["delta_loss"])
    if noisy is not None:
        return f"{noisy[0].upper()}{noisy[1:]}."
    return f"The rescues sum to {sum(rescues.values()):+.4f}, Δloss is {found['delta_loss']:+.4f}."


def trust(data: Data) -> str:
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
    table = table_of(rows, ["figure", "against", "runs", "mean rank correlation", "least"])
    best = max(values, key=lambda key: mean(values[key]) if key[1] == "alone" else -1.0)
    return (
        f"Over all of these runs (path only where it was presented):\n\n{table}\n\nThe closest to "
        f"`alone` is {best[0]}; no figure replaces a measurement at the sites that it names."
    )


def costs(data: Data) -> str:
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
    table = table_of(
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
        "for `in_order` and 30 for `path`. Times are of a machine that other work shared.\n\n"
        f"{table}"
    )
