"""The explicit table of repairs, and how a scheme's ``+name(option=value)`` become passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fxquant import passes
from fxquant.errors import CalibrationError, SchemeError
from fxquant.files.locks import check_writable
from fxquant.pipeline.repair import Repair
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.spelling import Options

_KNOWN: tuple[type[Repair], ...] = (
    *(passes.Attn8, passes.Awq, passes.Clip, passes.CorrectBias, passes.Equalize, passes.Gptq),
    *(passes.Kv4, passes.Kv8, passes.Refine, passes.Rotate, passes.Smooth, passes.SplitOutliers),
)
REPAIRS = {repair.name: repair for repair in _KNOWN}


def reads_calibration(scheme: Scheme) -> bool:
    """Whether calibration data matter to the scheme: to static ranges, or to a repair."""
    hungry = (REPAIRS[name].needs_calibration for name, _ in scheme.repairs if name in REPAIRS)
    return scheme.needs_calibration or any(hungry)


def can_resume(scheme: Scheme) -> bool:
    """Whether a repair of the scheme keeps finished blocks."""
    return any(name in REPAIRS and REPAIRS[name].resumes for name, _ in scheme.repairs)


def check_cache(scheme: Scheme, cache: Path | None) -> None:
    """Raise SchemeError for a cache that nothing in the scheme uses, WriteError where finished
    blocks cannot be kept."""
    if cache is not None and not can_resume(scheme):
        able = ", ".join(name for name, repair in REPAIRS.items() if repair.resumes)
        raise SchemeError(
            f"cache={cache}: nothing in scheme {scheme} keeps finished blocks ({able} do): leave "
            "it out"
        )
    if cache is not None:
        check_writable(cache, "cache folder")


def check_calibration(
    scheme: Scheme, repairs: Sequence[Repair], calibration: Batches | None, calibrates: bool
) -> None:
    """Raise CalibrationError where ``repairs``, and calibrate if it runs too, cannot be fed."""
    hungry = [repair.name for repair in repairs if repair.needs_calibration]
    if hungry and calibration is None:
        raise CalibrationError(
            f"scheme {scheme}: {', '.join(hungry)} needs calibration data: pass "
            "calibration=batches (LongTensors [batch, length]; on the command line "
            "--calibration-windows)"
        )
    if calibrates and calibration is None:
        raise CalibrationError(
            f"scheme {scheme} has static activation ranges and needs calibration data: pass "
            "calibration=batches (LongTensors [batch, length]; on the command line "
            "--calibration-windows), or take a dynamic scheme such as w8a8-dynamic"
        )
    readers = sum(repair.readings for repair in repairs) + calibrates
    if readers > 1 and isinstance(calibration, Iterator):
        raise CalibrationError(
            f"scheme {scheme} reads the calibration data {readers} times, and an iterator can be "
            "read once: pass a list or tensor of batches"
        )


def resolve_repairs(scheme: Scheme) -> tuple[Repair, ...]:
    """The scheme's repairs as passes, in the order written.

    Raises SchemeError for a name, an option or an option's value that is not known.
    """
    strangers = ", ".join(name for name, _ in scheme.repairs if name not in REPAIRS)
    if strangers:
        known = ", ".join(REPAIRS) or "none in this version"
        raise SchemeError(f"unknown pass in scheme {scheme}: {strangers}; known: {known}")
    return tuple(_resolve(name, options) for name, options in scheme.repairs)


def _resolve(name: str, options: Options) -> Repair:
    kind = REPAIRS[name]
    unknown = [option for option, _ in options if option not in kind.option_names()]
    if unknown:
        known = ", ".join(kind.option_names()) or "none"
        raise SchemeError(f"{name} has no option {', '.join(unknown)}; its options: {known}")
    return kind(**dict(options))
