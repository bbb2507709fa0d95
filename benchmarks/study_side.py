"""int8 and E4M3 on the same static ranges: a part of docs/why_static_fails.md.

From benchmarks/side_by_side.json, which holds figures of each window by itself: each figure here is
their mean, with its standard error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from statistics import mean, stdev
from typing import Any

from benchmarks.causes_found import causes_found
from benchmarks.study_trust import table_of
from fxquant.ir.calibration import version_words
from fxquant.ir.counted import counted

Window = dict[str, Any]
INT8, E4M3 = "w8a8-static:absmax", "fp8-static"
NAMES = {INT8: "int8", E4M3: "E4M3"}
TITLE = "## int8 and E4M3 on the same ranges"


def side_by_side(data: dict[str, Any]) -> Iterator[str]:
    """The section, a block each."""
    runs = {scheme: data["schemes"][scheme] for scheme in (INT8, E4M3)}
    count = min(map(len, runs.values()))
    runs = {scheme: windows[:count] for scheme, windows in runs.items()}
    yield TITLE
    yield (
        f"`{INT8}` and `{E4M3}` calibrate the same ranges: the largest |x| of each input, one "
        f"scale for a whole tensor; weights have a scale a channel. {data['name']} "
        f"(`{data['model']}`), "
        f"{counted(count, 'window')} of {data['length']} tokens, "
        f"{data['calibration_windows']} to calibrate; each window is taken apart by itself "
        "(`python -m benchmarks.side_by_side`), and a figure is the mean over windows ± its "
        "standard error."
    )
    yield _causes(runs)
    yield _verdict(runs)
    yield "By kind of site, each kind quantized alone; SQNR and zeroed are means over its sites:"
    yield _kinds(runs)
    yield "At the sites that lose most under int8 in the study above, each quantized alone:"
    yield _sites(runs)
    yield (
        "Zeroed: the share of the input's elements that are not zero and become it. The channel is "
        "the one with most blame, with its mean share of it, in all windows unless a number of "
        "them is said. Blame under E4M3 is given by the same rule, though its steps near zero do "
        "not grow with the range: there it says which channel stands out, not which one costs."
    )
    yield (
        f"Text: {data['text']} ({data['text_hash'][:23]}); float32 on CPU, "
        f"{counted(data['threads'], 'thread')}; {version_words(data['versions'])}."
    )


def _spread(values: list[float], form: str = "+.4f") -> str:
    """Mean ± standard error of the mean."""
    if len(values) < 2:
        return format(mean(values), form)
    error = stdev(values) / math.sqrt(len(values))
    return f"{mean(values):{form}} ± {error:{form.lstrip('+')}}"


def _column(windows: list[Window], figure: Callable[[Window], float], form: str = "+.4f") -> str:
    return _spread([figure(window) for window in windows], form)


def _causes(runs: dict[str, list[Window]]) -> str:
    causes = causes_found(window["causes"] for windows in runs.values() for window in windows)
    rows = [
        [
            NAMES[scheme],
            f"`{scheme}`",
            _column(windows, lambda w: w["delta_loss"]),
            *(_column(windows, lambda w, c=cause: w["causes"].get(c, 0.0)) for cause in causes),  # type: ignore[misc]
        ]
        for scheme, windows in runs.items()
    ]
    return table_of(rows, ["grid", "scheme", "Δloss", *causes])


def _verdict(runs: dict[str, list[Window]]) -> str:
    rounding = {s: mean(w["causes"]["rounding"] for w in each) for s, each in runs.items()}
    weights = {
        s: _column(each, lambda w: w["causes"]["weights"], "+.3f") for s, each in runs.items()
    }
    down = {s: mean(_of_down(w, "flushed") for w in each) for s, each in runs.items()}
    return (
        f"The ranges are the same, so what differs is where the numbers lie inside them. int8's "
        f"are evenly spaced: under a range that a few channels stretch, "
        f"{down[INT8]:.1%} of the inputs of down_proj become zero, and rounding is "
        f"{rounding[INT8]:+.3f} of the loss. E4M3 has numbers down to 2⁻⁹ of its scale, one in "
        f"230,000 of its largest, with a relative error of at most 1/16 from 2⁻⁶ on: "
        f"{down[E4M3]:.1%} become zero, and rounding is {rounding[E4M3]:+.3f}. Weights, which have "
        f"no such outliers, take {weights[E4M3]} under E4M3 and {weights[INT8]} under int8."
    )


def _of_down(window: Window, field: str) -> float:
    return float(next(value for kind, value in window[field].items() if "down_proj" in kind))


def _kinds(runs: dict[str, list[Window]]) -> str:
    rows = []
    for kind in runs[INT8][0]["kinds"]:
        row = [kind]
        for windows in runs.values():
            row += [
                _column(windows, lambda w, k=kind: w["kinds"][k]),  # type: ignore[misc]
                _column(windows, lambda w, k=kind: w["sqnr_db"][k], ".1f"),  # type: ignore[misc]
                f"{mean(w['flushed'][kind] for w in windows):.1%}",
            ]
        rows.append(row)
    return table_of(rows, ["kind", *_heads("alone", "SQNR, dB", "zeroed")])


def _heads(*names: str) -> list[str]:
    return [f"{NAMES[scheme]} {name}" for scheme in (INT8, E4M3) for name in names]


def _sites(runs: dict[str, list[Window]]) -> str:
    order = sorted(
        runs[INT8][0]["sites"],
        key=lambda path: -mean(w["sites"][path]["alone"] for w in runs[INT8]),
    )
    rows = []
    for path in order:
        row = [path]
        for windows in runs.values():
            sites = [window["sites"][path] for window in windows]
            row += [
                _spread([site["alone"] for site in sites]),
                f"{mean(site['share_flushed'] for site in sites):.1%}",
                _channel(sites),
            ]
        rows.append(row)
    return table_of(rows, ["site", *_heads("alone", "zeroed", "channel")])


def _channel(sites: list[dict[str, Any]]) -> str:
    """The channel that is most to blame in most windows, its mean share of the blame there."""
    first = Counter(site["channels"][0]["channel"] for site in sites)
    channel, windows = first.most_common(1)[0]
    shares = [
        each["blame"]
        for site in sites
        for each in site["channels"][:1]
        if each["channel"] == channel
    ]
    said = "" if windows == len(sites) else f" in {windows}"
    return f"{channel}{said} ({mean(shares):.0%})"
