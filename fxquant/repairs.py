"""The explicit table of repairs, and how a scheme's ``+name(option=value)`` become passes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxquant.batches import Batches
from fxquant.errors import CalibrationError, SchemeError
from fxquant.locks import check_writable
from fxquant.passes import (
    Attn8,
    Awq,
    Clip,
    CorrectBias,
    Equalize,
    Gptq,
    Kv4,
    Kv8,
    Refine,
    Rotate,
    Smooth,
    SplitOutliers,
)
from fxquant.repair import Repair
from fxquant.schemes import Scheme

_KNOWN: tuple[type[Repair], ...] = (
    Attn8,
    Awq,
    Clip,
    CorrectBias,
    Equalize,
    Gptq,
    Kv4,
    Kv8,
    Refine,
    Rotate,
    Smooth,
    SplitOutliers,
)
REPAIRS: dict[str, type[Repair]] = {repair.name: repair for repair in _KNOWN}


def can_resume(scheme: Scheme) -> bool:
    """Whether a repair of the scheme keeps finished blocks."""
    return any(name in REPAIRS and REPAIRS[name].resumes for name, _ in scheme.repairs)


def check_repairs(scheme: Scheme, calibration: Batches | None, cache: Path | None = None) -> None:
    """Raise SchemeError or CalibrationError where the scheme's repairs cannot be built, WriteError
    where finished blocks cannot be kept."""
    repairs = resolve_repairs(scheme, calibration, progress=False)
    if cache is not None and not can_resume(scheme):
        able = ", ".join(name for name, repair in REPAIRS.items() if repair.resumes)
        raise SchemeError(
            f"cache={cache}: nothing in scheme {scheme} keeps finished blocks ({able} do): leave "
            "it out"
        )
    if cache is not None:
        check_writable(Path(cache), "cache folder")
    hungry = [repair.name for repair in repairs if repair.needs_calibration]
    if hungry and calibration is None:
        raise CalibrationError(
            f"scheme {scheme}: {', '.join(hungry)} needs calibration data: pass "
            "calibration=batches (LongTensors [batch, length])"
        )
    readers = sum(repair.readings for repair in repairs) + scheme.needs_calibration
    if readers > 1 and isinstance(calibration, Iterator):
        raise CalibrationError(
            f"scheme {scheme} reads the calibration data {readers} times, and an iterator can be "
            "read once: pass a list or tensor of batches"
        )


def resolve_repairs(
    scheme: Scheme, calibration: Batches | None, progress: bool, cache: Path | None = None
) -> tuple[Repair, ...]:
    """The scheme's repairs as passes, in the order written; SchemeError names what is unknown."""
    strangers = ", ".join(name for name, _ in scheme.repairs if name not in REPAIRS)
    if strangers:
        known = ", ".join(REPAIRS) or "none in this version"
        raise SchemeError(f"unknown pass in scheme {scheme}: {strangers}; known: {known}")
    return tuple(
        _resolve(
            name,
            dict(options),
            {"scheme": scheme, "batches": calibration, "progress": progress, "cache": cache},
        )
        for name, options in scheme.repairs
    )


def _resolve(name: str, options: dict[str, Any], given: dict[str, Any]) -> Repair:
    kind = REPAIRS[name]
    unknown = [option for option in options if option not in kind.option_names()]
    if unknown:
        known = ", ".join(kind.option_names()) or "none"
        raise SchemeError(f"{name} has no option {', '.join(unknown)}; its options: {known}")
    try:
        return kind(**given, **options)
    except TypeError as error:
        raise SchemeError(f"scheme {given['scheme']}: {name}: {error}") from error
