"""The printed report of an Explanation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from fxquant.analysis.announcement import left_out, run_text
from fxquant.analysis.channels import Channel, Token
from fxquant.analysis.parts import EVERY_CAUSE, Cause
from fxquant.analysis.progress import clock
from fxquant.analysis.reading import (
    BLOCKS,
    closed_blocks,
    opposed_words,
    rank_words,
    ranked_sites,
)
from fxquant.analysis.results import Findings, GroupFigures, SiteFigures, rank_value
from fxquant.ir.counted import counted

_WORST = 12
DETAILED = 3  # of the worst sites
_SCALE_LEGEND = (
    "scale: rounding of the scales themselves; its energy is what it adds to that of weights and "
    "rounding, less than nothing where the steps got finer."
)
_SITES_LEGEND = (
    "clipped, rounded to zero: shares of the elements of the site's input on these windows, those "
    "beyond the range by more than half a step, and those that are not zero but become it. "
    "energy: each part's share of the squared error of the site's output."
)


_VALIDATION_LEGEND = (
    "rank correlation: Spearman's, over the sites that have both. same worst 8: share of the "
    "effect's eight largest sites (all where there are fewer) that are among the figure's. error: "
    "sum of |figure - effect| over sum of |effect|, of figures in nats."
)


@dataclass(frozen=True)
class Explanation(Findings):
    """Where the loss comes from. ``print`` gives the report, ``to_dict`` plain data."""

    def __str__(self) -> str:
        return report(self)


def report(found: Findings) -> str:
    """The whole report, tables in GitHub's form."""
    return "\n\n".join(_sections(found))


def _sections(found: Findings) -> Iterator[str]:
    yield _head(found)
    if found.causes is not None:
        yield "Causes (exact Shapley values, nats a token)\n" + _table(
            [
                [cause, _nats(value), _share(value, found.delta_loss)]
                for cause, value in found.causes.items()
            ],
            ["cause", "effect", "of Δloss"],
        )
    if any(kind.sums or kind.measured or kind.causes for kind in found.kinds):
        yield f"Kinds of site\n{_groups(found.kinds)}"
    if len(found.blocks) > 1:
        worst = sorted(found.blocks, key=lambda group: -_first(group, found.ranking))[:6]
        yield f"Worst blocks, by {found.ranking}\n{_groups(worst)}"
    rank = rank_words(found, DETAILED)
    yield "\n".join(
        filter(None, [f"Worst sites, {_ranked(found)}", _sites(found), rank, _legend(found)])
    )
    yield from _details(found.worst[:DETAILED])
    if found.counterfactuals:
        yield "Another choice at one site, everything else as it is\n" + _table(
            [
                [c.site, c.choice, _nats(c.delta_loss), _nats(c.recovered)]
                for c in found.counterfactuals
            ],
            ["site", "choice", "Δloss", "recovered"],
        )
    if words := opposed_words(found):
        yield "\n".join(words)
    if found.recovery:
        yield f"The worst sites in float, by {found.ranking}\n" + _table(
            [[step.fixed, _nats(step.delta_loss)] for step in found.recovery],
            ["sites in float", "Δloss"],
        )
    if found.path is not None:
        yield _path(found)
    if found.validation:
        table = validation_table(found)
        yield f"Cheap figures against exact effects\n{table}\n{_VALIDATION_LEGEND}"
    yield "\n".join(_run(found))
    yield _costs(found)
    if found.notes:
        yield "\n".join(found.notes)


def _legend(found: Findings) -> str:
    rounded = any("scale" in site.energy for site in found.sites)
    return f"{_SITES_LEGEND} {_SCALE_LEGEND}" if rounded else _SITES_LEGEND


def _head(found: Findings) -> str:
    where = f" at sites {found.sites_pattern}" if found.sites_pattern else ""
    count, longest = found.windows
    shortest = found.shortest_window
    length = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    lines = [
        f"{found.model} under {found.scheme}{where}: "
        f"{counted(len(found.sites), 'site')}, "
        f"{counted(count, 'window')} of {length} tokens",
        f"loss float {found.loss_float:.4f}, quantized {found.loss_quantized:.4f}, "
        f"Δloss {found.delta_loss:+.4f}",
    ]
    shift = found.loss_float - found.loss_unrepaired
    if abs(shift) > 1e-6:
        lines.append(f"the repairs alone move the float loss by {shift:+.6f}")
    return "\n".join(lines)


def _first(group: GroupFigures, method: str) -> float:
    return group.sums.get(method, group.measured.get(f"{method}:blocks", 0.0))


def _ranked(found: Findings) -> str:
    """By what, and how many sites have the figure where not all have."""
    count = len(ranked_sites(found))
    if count == len(found.sites):
        return f"by {found.ranking}"
    return (
        f"by {found.ranking} ({count} of {len(found.sites)} measured, those of the worst blocks; "
        "where a block was not opened, its line is that of all its sites together)"
    )


def _run(found: Findings) -> Iterator[str]:
    yield f"Run: {run_text(found.methods)}."
    yield f"Not run: {left_out(found.methods)}."
    if found.left_out and found.time_limit is not None:
        yield (
            f"Left out, since {clock(found.time_limit)} had passed or would have: "
            f"{'; '.join(found.left_out)}. More time runs them (--minutes 10; in Python "
            "minutes=10), and with the same output folder goes on from what is there."
        )


def _groups(groups: Iterable[GroupFigures]) -> str:
    rows = list(groups)
    sums = list(dict.fromkeys(name for row in rows for name in row.sums))
    measured = list(dict.fromkeys(name for row in rows for name in row.measured))
    causes = [cause for cause in EVERY_CAUSE if any(cause in (row.causes or ()) for row in rows)]
    body = [
        [
            row.name,
            row.sites,
            *(_nats(row.sums.get(name)) for name in sums),
            *(_nats(row.measured.get(name)) for name in measured),
            *(_nats((row.causes or {}).get(cause)) for cause in causes),
        ]
        for row in rows
    ]
    headers = [f"{name}, sum" for name in sums] + measured + [f"{cause} alone" for cause in causes]
    return _table(body, ["", "sites", *headers])


def _sites(found: Findings) -> str:
    """Sites and blocks that were not opened, by what they add."""
    methods = list(dict.fromkeys(name for site in found.sites for name in site.effects))
    with_path = found.path is not None and found.path.refused is None
    headers = ["site", *methods, *(["path"] if with_path else []), "cause", "SQNR dB", "clipped"]
    causes = [cause for cause in EVERY_CAUSE if any(cause in site.energy for site in found.sites)]
    headers += ["rounded to zero", *(f"{cause} energy" for cause in causes)]
    rows = [
        (rank_value(site, found.ranking), _site(site, methods, with_path, causes))
        for site in ranked_sites(found)
    ]
    for block in closed_blocks(found):
        effect = block.measured[BLOCKS]
        effects = [_nats(effect) if name == "in_order" else "" for name in methods]
        cells = [f"{block.name}, {counted(block.sites, 'site')} not opened", *effects]
        rows.append((effect, [*cells, *[""] * (len(headers) - len(cells))]))
    rows.sort(key=lambda row: -row[0])
    return _table([cells for _, cells in rows[:_WORST]], headers)


def _site(
    site: SiteFigures, methods: Sequence[str], with_path: bool, causes: Sequence[Cause]
) -> list[str]:
    total = sum(site.energy.values()) or 1.0
    row = [site.site, *(_nats(site.effects.get(name)) for name in methods)]
    row += [_nats(sum(site.path.values()))] if with_path and site.path else []
    row += [f"{site.cause}, {site.cause_by}", f"{site.sqnr_db:.1f}", f"{site.share_clipped:.3%}"]
    row += [f"{site.share_flushed:.1%}"]
    return [*row, *(f"{site.energy.get(cause, 0.0) / total:.0%}" for cause in causes)]


def _details(sites: Iterable[SiteFigures]) -> Iterator[str]:
    for site in sites:
        lines = [f"{site.site}:"]
        if site.causes is not None:
            parts = ", ".join(f"{cause} {_nats(value)}" for cause, value in site.causes.items())
            lines.append(f"  causes (all else quantized): {parts}")
        if site.range_energy:
            lines.append(
                f"  energy of clipping and rounding together {site.range_energy:.3g}: the best "
                f"range would leave {site.rounding_floor:.3g}, the range mismatch is "
                f"{site.range_mismatch:.3g}"
            )
        if site.worst_channels:
            lines.append("  channels: " + "; ".join(map(_channel, site.worst_channels)))
        lines.append("  tokens: " + "; ".join(map(_token, site.worst_tokens)))
        groups = ", ".join(f"{name} {share:.0%}" for name, share in site.token_groups.items())
        lines.append(f"  error energy by kind of token: {groups}")
        yield "\n".join(lines)


def _channel(channel: Channel) -> str:
    return (
        f"{channel.channel} ({_carried(channel)}, max|x| {channel.peak:.3g}, "
        f"{channel.peak_over_median:.0f}x the median channel's)"
    )


def _token(token: Token) -> str:
    name = f"id {token.token_id}" if token.text is None else repr(token.text)
    return f"{name} at {token.window}:{token.position} ({_carried(token)})"


def _carried(item: Channel | Token) -> str:
    effect = "" if item.effect is None else f", path {_nats(item.effect)}"
    return f"{item.blame:.0%} of the blame, {item.share:.1%} of the energy{effect}"


def _path(found: Findings) -> str:
    path = found.path
    assert path is not None
    text = (
        f"path: {path.points} points, sum {path.estimate:+.4f}, residual {path.residual:+.4f} "
        f"against the measured {found.delta_loss:+.4f}"
    )
    return text if path.refused is None else f"{text}\npath is not presented: {path.refused}"


def validation_table(found: Findings) -> str:
    """Rank correlation, share of common worst sites and relative error of each cheap figure."""
    return _table(
        [
            [
                each.figure,
                each.against,
                each.sites,
                f"{each.rank_correlation:.3f}",
                f"{each.top:.0%}",
                "" if each.error is None else f"{each.error:.2f}",
            ]
            for each in found.validation
        ],
        ["figure", "against", "sites", "rank correlation", "same worst 8", "error"],
    )


def _costs(found: Findings) -> str:
    body = [
        [name, f"{cost.forwards:.1f}", f"{cost.measured_forwards:.1f}", f"{cost.seconds:.1f}"]
        for name, cost in found.costs.items()
    ]
    table = _table(body, ["method", "forwards, by nodes", "forwards, by time", "seconds"])
    text = (
        f"Cost; one forward takes {found.forward_seconds:.2f} s; a backward pass is taken for two "
        f"forwards by nodes\n{table}"
    )
    partial = [name for name, cost in found.costs.items() if cost.partial]
    if partial:
        text += f"\nresumed, only what was run again is counted: {', '.join(partial)}"
    return text


def _table(rows: Sequence[Sequence[object]], headers: list[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


def _share(value: float, total: float) -> str:
    return f"{value / total:.0%}" if total else ""
