"""What to do at one site, as frozen dataclasses. spelling.py writes and reads them as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fxquant.errors import SchemeError
from fxquant.formats.floating import FloatGrid
from fxquant.formats.grid import Grid
from fxquant.formats.scales import FP32, PowerScale, ScaleFormat

Granularity = Literal["tensor", "channel", "token", "group"]
EstimatorKind = Literal["absmax", "percentile", "mse", "entropy"]


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor becomes codes.

    ``grid``: the numbers that an element may be, before its scale: ``integer(8)``.
    ``granularity``: "tensor", "channel" (rows of a weight), "token" (rows of an activation), or
    "group" (``group_size`` columns of each row share a scale, the last group may be shorter).
    ``scale``: how the scales of groups are kept; fp32 for all others.
    Raises SchemeError when the parts do not go together.
    """

    grid: Grid
    granularity: Granularity = "channel"
    group_size: int | None = None
    scale: ScaleFormat = FP32

    def __post_init__(self) -> None:
        if (self.granularity == "group") != (self.group_size is not None):
            raise SchemeError("granularity 'group' and group_size go together")
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(f"group_size must be at least 1, got {self.group_size}")
        if self.scale != FP32 and self.granularity != "group":
            raise SchemeError(f"scales in {self.scale.name} are those of groups")
        if self.grid.has_zero_point and not self.scale.zero_points:
            raise SchemeError(
                f"scales in {self.scale.name} are those of groups without zero points"
            )
        even = isinstance(self.scale, PowerScale) and self.scale.rule == "even"
        if even and not isinstance(self.grid, FloatGrid):
            raise SchemeError(f"the rule even rounds to a mantissa, which {self.grid.name} has not")


@dataclass(frozen=True)
class Estimator:
    """How a static range follows from a calibrated distribution; percent only for percentile."""

    kind: EstimatorKind
    percent: float | None = None

    def __post_init__(self) -> None:
        if (self.kind == "percentile") != (self.percent is not None):
            raise SchemeError("a percentile, and only a percentile, has a percent")
        if self.percent is not None and not 50 < self.percent <= 100:
            raise SchemeError(f"percentile must be above 50 and at most 100, got {self.percent}")


DEFAULT_ESTIMATOR = Estimator("percentile", 99.9)


@dataclass(frozen=True)
class ActivationSpec:
    """An input's codes, and where its range comes from: dynamic, or static with an estimator."""

    tensor: TensorSpec
    estimator: Estimator | None = None

    def __post_init__(self) -> None:
        allowed = ("tensor",) if self.estimator else ("tensor", "token", "group")
        if self.tensor.granularity not in allowed:
            raise SchemeError(
                f"a {'static' if self.estimator else 'dynamic'} activation is "
                f"per {' or '.join(allowed)}, not per {self.tensor.granularity}"
            )
        if self.tensor.granularity == "group" and self.tensor.grid.has_zero_point:
            raise SchemeError("groups of an activation have no zero points")

    @property
    def dynamic(self) -> bool:
        return self.estimator is None


@dataclass(frozen=True)
class SiteSpec:
    """What one site does; both None leaves it in float."""

    weight: TensorSpec | None = None
    activation: ActivationSpec | None = None

    def __post_init__(self) -> None:
        if self.weight is None and self.activation is not None:
            raise SchemeError("an activation is quantized only together with its weight")
        if self.weight is not None and self.weight.granularity == "token":
            raise SchemeError("a weight is per tensor, channel or group, not per token")


FLOAT = SiteSpec()
