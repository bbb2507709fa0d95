"""What explain returns: plain numbers, all losses in nats a token."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fxquant.analysis.channels import Channel, Token
from fxquant.analysis.counterfactuals import Counterfactual, Recovery
from fxquant.analysis.parts import Cause
from fxquant.analysis.validation import Agreement

BY_MSE = "local MSE"  # a ranking


@dataclass(frozen=True)
class SiteFigures:
    """Everything found about one site.

    ``effects``: the site's figure for each of alone, rescue, in_order and first_order that was run
    there (in_order:worst measures in_order at the sites of the worst blocks only);
    ``path`` by cause (None if not run or refused); ``causes``: Shapley values of the site's own
    parts with everything else quantized, which sum to rescue (worst sites only).
    Local figures are on the input that arrives in the quantized model: see local.py.
    ``range_energy``: of clipping and rounding together, of which ``rounding_floor`` would be left
    under the best range and ``range_mismatch`` is the rest.
    """

    site: str
    kind: str
    block: str | None
    effects: dict[str, float]
    path: dict[Cause, float] | None
    causes: dict[Cause, float] | None
    energy: dict[Cause, float]
    range_energy: float
    rounding_floor: float
    range_mismatch: float
    sqnr_db: float
    mse: float
    share_clipped: float
    share_flushed: float
    worst_channels: tuple[Channel, ...]
    worst_tokens: tuple[Token, ...]
    token_groups: dict[str, float]

    @property
    def cause(self) -> Cause:
        """What makes the site's error: by its effect where measured, else by its energy.

        Also by its energy where the error happens to lower the loss of the quantized model: the
        part that lowers it least is not the part that makes the error.
        """
        causes = self.causes or {}
        values = causes if sum(causes.values()) > 0 else self.energy
        return max(values, key=lambda cause: values[cause])

    @property
    def cause_by(self) -> str:
        """What ``cause`` goes by: "Shapley", its effect on the loss, or "energy" at the site."""
        return "Shapley" if sum((self.causes or {}).values()) > 0 else "energy"


@dataclass(frozen=True)
class GroupFigures:
    """A kind of site or a block: sums of its sites' figures, and what was measured jointly.

    ``causes``: Shapley values with only this kind quantized. ``measured``: by method, such as
    "rescue:kinds", with the group's sites changed together.
    """

    name: str
    sites: int
    sums: dict[str, float]
    measured: dict[str, float]
    causes: dict[Cause, float] | None


@dataclass(frozen=True)
class PathFigures:
    """The integral as a whole; ``refused`` says why its figures are not presented."""

    estimate: float
    residual: float
    points: int
    refused: str | None


@dataclass(frozen=True)
class MethodCost:
    """``forwards``: by nodes, a backward pass as two of them (an assumption, not a measurement);
    ``seconds``; ``measured_forwards``: seconds over those of one plain forward with its loss.

    What a run that goes on takes from an earlier one counts with its cost then; ``partial``:
    some of it was not kept, and only what was run again is counted.
    """

    forwards: float
    seconds: float
    measured_forwards: float
    partial: bool = False


@dataclass(frozen=True)
class Findings:
    """Where the loss comes from; ``to_dict`` gives plain data.

    ``delta_loss`` = loss_quantized - loss_float, where float is the graph after the scheme's
    repairs; ``loss_unrepaired`` is the model's own loss. ``ranking`` names the figure by which
    sites are called worst. ``causes`` is None unless the method was run. ``windows``: how many, and
    the tokens of the longest. ``methods``: those that were run; ``left_out``: what was not, for
    ``time_limit``, seconds.
    """

    model: str
    scheme: str
    sites_pattern: str | None
    windows: tuple[int, int]
    shortest_window: int
    loss_unrepaired: float
    loss_float: float
    loss_quantized: float
    causes: dict[Cause, float] | None
    sites: tuple[SiteFigures, ...]
    kinds: tuple[GroupFigures, ...]
    blocks: tuple[GroupFigures, ...]
    path: PathFigures | None
    counterfactuals: tuple[Counterfactual, ...]
    recovery: tuple[Recovery, ...]
    validation: tuple[Agreement, ...]
    ranking: str
    forward_seconds: float
    costs: dict[str, MethodCost]
    methods: tuple[str, ...]
    left_out: tuple[str, ...]
    time_limit: float | None
    notes: tuple[str, ...]

    @property
    def delta_loss(self) -> float:
        return self.loss_quantized - self.loss_float

    @property
    def worst(self) -> tuple[SiteFigures, ...]:
        """The sites, worst first, by ``ranking``."""
        return tuple(sorted(self.sites, key=lambda each: -rank_value(each, self.ranking)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite become None."""
        data = dataclasses.asdict(self)
        data["delta_loss"] = self.delta_loss
        for site, figures in zip(data["sites"], self.sites, strict=True):
            site.update(site.pop("effects"))
            site["cause"] = figures.cause
            site["cause_by"] = figures.cause_by
        plain = _plain(data)
        assert isinstance(plain, dict)
        return plain


def rank_value(site: SiteFigures, ranking: str) -> float:
    """The figure by which sites are ranked: an effect, or the local mean squared error.

    -inf where that was not measured: such sites come last.
    """
    if ranking == BY_MSE:
        return site.mse
    if ranking == "path":
        return sum((site.path or {}).values())
    return site.effects.get(ranking, -math.inf)


def is_ranked(site: SiteFigures, ranking: str) -> bool:
    """Whether the figure by which sites are ranked was measured at this one."""
    return ranking in ("path", BY_MSE) or ranking in site.effects


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
