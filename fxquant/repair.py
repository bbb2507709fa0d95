"""Repair: a pass that a scheme names behind ``+``, and what every such pass is given."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

from fxquant.batches import Batches
from fxquant.pipeline import Pass
from fxquant.schemes import Scheme

_GIVEN = ("scheme", "batches", "progress", "cache")


@dataclass(frozen=True)
class Repair(Pass):
    """A pass on the named float graph; further fields are its options, spelled ``name(a=1)``.

    Class attributes: ``needs_calibration``, whether it reads ``batches``; ``after_calibration``,
    whether it runs behind calibrate, just before quantize, rather than in front of observe;
    ``makes_sites``, whether the scheme's overrides may name sites that it makes (from structure
    alone); ``resumes``, whether an interrupted run can go on from ``cache``.

    Args:
        scheme: the scheme being built: which sites become codes, and of what kind.
        batches: calibration data that can be read more than once; None if there is none.
        cache: a folder that keeps finished blocks; None keeps nothing.
    """

    needs_calibration: ClassVar[bool] = True
    after_calibration: ClassVar[bool] = False
    makes_sites: ClassVar[bool] = False
    resumes: ClassVar[bool] = False

    scheme: Scheme = field(kw_only=True, repr=False)
    batches: Batches | None = field(default=None, kw_only=True, repr=False, compare=False)
    progress: bool = field(default=False, kw_only=True, repr=False)
    cache: Path | None = field(default=None, kw_only=True, repr=False, compare=False)

    @property
    def readings(self) -> int:
        """How often it reads the calibration data."""
        return int(self.needs_calibration)

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The options that a scheme may set."""
        return tuple(f.name for f in fields(cls) if f.name not in _GIVEN)
