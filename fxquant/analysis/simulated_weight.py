"""A site's weight as explain sees it: with any subset of the parts of its error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fxquant.analysis.parts import Cause, Parts, combined, ordered
from fxquant.numerics.quantizer import Quantizer, Split
from fxquant.schemes.specs import TensorSpec


@dataclass(frozen=True, eq=False)
class SimulatedWeight:
    """W [N, K] and Ŵ, its dequantized codes, in the model's dtype.

    ``split``: W by steps, where scales are rounded themselves and no repair chose the codes; None
    elsewhere: the whole of Ŵ - W is then "weights".
    """

    float_: Tensor
    coded: Tensor
    split: Split | None

    @classmethod
    def of(cls, weight: Tensor, coded: Tensor, spec: TensorSpec, nearest: bool) -> Self:
        """``nearest``: the codes are the nearest ones, no repair's."""
        quantizer = Quantizer(spec)
        if not (quantizer.rounds_scale and nearest):
            return cls(weight, coded, None)
        split = quantizer.split(weight)
        clips = not torch.equal(split.clipped, weight)
        return cls(weight, coded, split if clips else replace(split, clipped=weight))

    @property
    def causes(self) -> Parts:
        """The parts that Ŵ - W has."""
        if self.split is None:
            return frozenset(("weights",))
        clips = self.split.clipped is not self.float_
        return frozenset(("weights", "scale", *(("clipping",) if clips else ())))

    def under(self, parts: Parts) -> Tensor:
        """W with these parts of its error."""
        if self.split is None:
            return self.coded if "weights" in parts else self.float_
        # Of a weight, "weights" is what "rounding" is of an input.
        own: set[Cause] = {"rounding"} if "weights" in parts else set()
        return combined(self.float_, self.split, frozenset({*own, *(parts - {"rounding"})}))

    def errors(self, rows: Callable[[Tensor], Tensor] = lambda whole: whole) -> dict[Cause, Tensor]:
        """The parts of Ŵ - W, those that there can be; ``rows``: which of its rows."""
        if self.split is None:
            return {"weights": rows(self.coded) - rows(self.float_)}
        split = self.split
        ends: dict[Cause, tuple[Tensor, Tensor]] = {
            "weights": (split.exact, split.clipped),
            "clipping": (split.clipped, self.float_),
            "scale": (split.rounded, split.exact),
        }
        return {each: rows(ends[each][0]) - rows(ends[each][1]) for each in ordered(self.causes)}
