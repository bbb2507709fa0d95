"""Repair: a pass that a scheme names behind ``+``, and that says at each place what it did."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from torch.fx import GraphModule

from fxquant.errors import NoEffectError
from fxquant.ir.counted import counted
from fxquant.ir.graph import add_note
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass
from fxquant.structure.outcome import Changed, Outcome

_SHOWN = 3


@dataclass(frozen=True)
class Repair(Pass):
    """A pass on the named float graph; its fields are its options, spelled ``name(a=1)``.

    Class attributes: ``needs_calibration``, whether it reads the context's batches;
    ``after_calibration``, whether it runs behind calibrate, just before quantize, rather than in
    front of observe; ``makes_sites``, whether the scheme's overrides may name sites that it makes
    (from structure alone); ``resumes``, whether an interrupted run can go on from the context's
    cache. ``no_place`` ends the sentence "scheme ..." where it finds nothing to work on, ``remedy``
    says what else to do about a repair without effect.
    """

    needs_calibration: ClassVar[bool] = True
    after_calibration: ClassVar[bool] = False
    makes_sites: ClassVar[bool] = False
    resumes: ClassVar[bool] = False
    no_place: ClassVar[str] = "quantizes no linear's weight"
    remedy: ClassVar[str] = "leave it out"

    @property
    def readings(self) -> int:
        """How often it reads the calibration data."""
        return int(self.needs_calibration)

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The options that a scheme may set."""
        return tuple(each.name for each in fields(cls))

    @abc.abstractmethod
    def apply(self, gm: GraphModule, context: Context) -> Iterable[Outcome]:
        """Change ``gm`` place by place, and say of each place what was done or why nothing was."""

    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        """``apply``, with a note on what it says; NoEffectError where it changed no place."""
        changed, blocked = False, dict[str, list[str]]()
        for place, outcome in self.apply(gm, context):
            if isinstance(outcome, Changed):
                changed, text = True, outcome.note
            else:
                text = outcome.reason
                blocked.setdefault(text, []).append(place)
            if text:
                add_note(gm, self.name, place, text)
        if not changed:
            why = _reasons(blocked) if blocked else f"scheme {context.scheme} {self.no_place}"
            raise NoEffectError(f"{self.name} had no effect: {why}; {self.remedy}")
        return gm


def _reasons(blocked: Mapping[str, list[str]]) -> str:
    """Each reason with the places that it holds for, the first few of them."""
    shown = [
        f"{places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}: {reason}"
        for reason, places in list(blocked.items())[:_SHOWN]
    ]
    more = len(blocked) - len(shown)
    return "; ".join(shown) + (f"; and {counted(more, 'more reason')}" if more else "")
