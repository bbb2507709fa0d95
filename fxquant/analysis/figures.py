"""From measurements to the figures of sites, kinds and blocks, and their validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fxquant.analysis.channels import Decode, group_shares, worst_channels, worst_tokens
from fxquant.analysis.effects import EFFECTS, GROUPED, By
from fxquant.analysis.local import LocalFigures
from fxquant.analysis.parts import Cause
from fxquant.analysis.path import PathResult, PathSite
from fxquant.analysis.results import GroupFigures, SiteFigures
from fxquant.analysis.sites import Place
from fxquant.analysis.validation import Agreement, agreement

Found = Mapping[str, Mapping[str, float]]  # method -> site or group -> nats


def site_figures(
    path: str,
    place: Place,
    found: Found,
    local: LocalFigures,
    along: PathSite | None,
    windows: Sequence[Tensor],
    decode: Decode | None,
) -> SiteFigures:
    """Everything about one site; ``along`` is None where path was not run or is refused."""
    return SiteFigures(
        site=path,
        kind=place.kind,
        block=place.block,
        effects={n: v[path] for n, v in found.items() if n not in GROUPED and path in v},
        path=None if along is None else dict(along.causes),
        causes=None,
        energy=dict(local.energy),
        range_energy=local.input,
        rounding_floor=local.floor,
        range_mismatch=local.range_mismatch,
        sqnr_db=local.sqnr_db,
        mse=local.mse,
        share_clipped=local.share_clipped,
        share_flushed=local.share_flushed,
        worst_channels=worst_channels(local, along),
        worst_tokens=worst_tokens(local, along, windows, decode),
        token_groups=group_shares(local, windows, decode),
    )


def group_figures(
    by: By,
    members: Mapping[str, Sequence[str]],
    figures: Mapping[str, SiteFigures],
    found: Found,
    causes: Mapping[str, dict[Cause, float]],
) -> tuple[GroupFigures, ...]:
    """Sums over the sites of each kind or block, beside what was measured jointly.

    A group has no sum of a figure that was not measured at all of its sites.
    """
    rows = []
    for name, paths in members.items():
        inside = [figures[path] for path in paths]
        whole = [m for m in inside[0].effects if all(m in each.effects for each in inside)]
        sums = {m: sum(each.effects[m] for each in inside) for m in whole}
        if inside[0].path is not None:
            sums["path"] = sum(sum((each.path or {}).values()) for each in inside)
        joint = [method for method in found if method in GROUPED and GROUPED[method].by == by]
        measured = {method: found[method][name] for method in joint}
        rows.append(GroupFigures(name, len(paths), sums, measured, causes.get(name)))
    return tuple(rows)


def validate(
    local: Mapping[str, LocalFigures], found: Found, path: PathResult | None
) -> tuple[Agreement, ...]:
    """Each cheap figure, and each exact effect, against the exact effects that were run."""
    if len(local) < 3:
        return ()
    cheap: dict[str, Mapping[str, float]] = {
        "local SQNR": {name: -each.sqnr_db for name, each in local.items()},
        "local MSE": {name: each.mse for name, each in local.items()},
    }
    nats = {name: values for name, values in found.items() if name not in GROUPED}
    if path is not None:
        name = "path (refused)" if path.refused else "path"
        nats[name] = {site: each.total for site, each in path.sites.items()}
    exact = [effect for effect in EFFECTS if len(found.get(effect, ())) >= 3]
    return tuple(
        agreement(figure, values, against, found[against], in_nats=figure in nats)
        for index, against in enumerate(exact)
        for figure, values in {**cheap, **nats}.items()
        if figure not in exact[index:] and len(values.keys() & found[against].keys()) >= 3
    )
