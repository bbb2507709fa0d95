"""Scheme, history and records of a saved graph: texts that are printed, and must tell one story."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import torch

from fxquant.errors import CheckpointError, SchemeError
from fxquant.ir.graph import GraphInfo, Level, Site
from fxquant.ir.records import PassRecord, SiteRecord
from fxquant.numerics.quantizer import range_qparams
from fxquant.recipes.repairs import resolve_repairs
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import ActivationSpec
from fxquant.schemes.spelling import (
    Options,
    Scanner,
    scan_repair,
    spell_activation,
    spell_estimator,
    spell_site,
)
from fxquant.structure.product_sites import operand_spec, whole_operand

_CODED = (Level.QDQ, Level.INTEGER)


def check_specs(facts: GraphInfo) -> None:
    """Raise CheckpointError where scheme, sites, history and site records do not agree.

    The scheme is spelled as fxquant spells it and its repairs ran, in that order; where it asks for
    codes the site has its record with that spec, and nothing else has one; what a record says of a
    static range goes together.
    """
    scheme = Scheme.parse(facts.scheme)
    if str(scheme) != facts.scheme:
        raise CheckpointError(f"info: the scheme {facts.scheme[:80]!r} is spelled {scheme}")
    _check_repairs(scheme, facts)
    if facts.level not in _CODED:
        if facts.site_records or facts.scheme not in ("fp", "fp32-gemm"):
            raise CheckpointError(f"info: scheme {scheme} or records of codes at level float")
        return
    scheme.check_overrides((site.path, site.role) for site in facts.sites)
    found = Counter((each.path, each.operand) for each in facts.site_records)
    (twice, count), *_ = found.most_common(1) or [(("", ""), 0)]
    if count > 1:
        raise CheckpointError(f"{' '.join(twice).strip()}: it has {count} records")
    wanted = {
        (site.path, operand): spec
        for site in facts.sites
        for operand, spec in expected_specs(scheme, site)
    }
    for record in facts.site_records:
        _check_record(record, wanted.pop((record.path, record.operand), ()), scheme)
    for path, operand in wanted:
        raise CheckpointError(
            f"{path} {operand}: scheme {scheme} asks for codes, of which nothing is recorded"
        )


Spec = tuple[str, ActivationSpec | None]
"""A record's text, and the input that it describes."""


def expected_specs(scheme: Scheme, site: Site) -> Iterator[tuple[str, tuple[Spec, ...]]]:
    """Each operand ("" for a linear's and an embedding's) with what its record may say.

    The right one of attention's products is per token or, of PV, in one scale.
    """
    if site.role == "matmul":
        own = operand_spec(scheme, site)
        if own is not None:
            whole = whole_operand(own)
            yield "left", ((spell_activation(own), own),)
            yield "right", ((spell_activation(own), own), (spell_activation(whole), whole))
        return
    spec = scheme.spec_for(site.path, site.role)
    if spec.weight is not None:
        yield "", ((spell_site(spec), spec.activation),)


def _check_record(record: SiteRecord, wanted: tuple[Spec, ...], scheme: Scheme) -> None:
    where = f"{record.path} {record.operand}".strip()
    known = dict(wanted)
    if record.spec not in known:
        expected = " or ".join(known) or "none: it stays float, or is no site"
        raise CheckpointError(
            f"{where}: its record says {record.spec[:80]}, by scheme {scheme} it is {expected}"
        )
    if (record.weight_sqnr is None) is not bool(record.operand):
        raise CheckpointError(f"{where}: a weight, and only a weight, has an SQNR")
    spec = known[record.spec]
    if spec is None or spec.dynamic:
        if not _empty(record):
            raise CheckpointError(f"{where}: it records a static range, which {record.spec} is not")
    else:
        _check_range(record, spec, where)


def _empty(record: SiteRecord) -> bool:
    ends = (record.low, record.high, record.seen_low, record.seen_high)
    rest = (record.scale, record.zero_point, record.estimator, record.clipped)
    return all(each is None for each in (*ends, *rest)) and not record.histogram


def _check_range(record: SiteRecord, spec: ActivationSpec, where: str) -> None:
    ends = (record.low, record.high, record.seen_low, record.seen_high)
    given = [end for end in ends if end is not None and math.isfinite(end)]
    if len(given) < len(ends) or record.scale is None or record.clipped is None:
        raise CheckpointError(f"{where}: its record lacks a static range, which {record.spec} has")
    assert spec.estimator is not None
    if record.estimator != spell_estimator(spec.estimator):
        raise CheckpointError(
            f"{where}: its range is said to be by {str(record.estimator)[:40]}, its spec says "
            f"{spell_estimator(spec.estimator)}"
        )
    low, high, seen_low, seen_high = (torch.tensor(end, dtype=torch.float32) for end in given)
    scale, zero_point = range_qparams(low, high, spec.tensor.grid)
    shift = 0 if zero_point is None else int(zero_point)
    if not math.isclose(record.scale, float(scale), rel_tol=1e-5) or record.zero_point != shift:
        raise CheckpointError(
            f"{where}: scale {record.scale:g} and zero point {record.zero_point} are not those of "
            f"its recorded range {float(low):g} to {float(high):g}"
        )
    if not (low <= high and seen_low <= seen_high and 0 <= record.clipped <= 1):
        raise CheckpointError(f"{where}: its recorded ranges or shares cannot be")
    inside = low <= seen_low and seen_high <= high
    if min(record.histogram, default=0) < 0 or (inside and record.clipped > 0):
        raise CheckpointError(f"{where}: its histogram, or the share outside of it, cannot be")


def _check_repairs(scheme: Scheme, facts: GraphInfo) -> None:
    """The scheme's repairs are a part of the history, in the order in which they run."""
    ran = iter(_ran(record) for record in facts.history)
    for name, options in _in_order(scheme):
        if not any(name == other and _agree(options, given) for other, given in ran):
            raise CheckpointError(
                f"info: scheme {scheme} names {name}, and no such pass is in the graph's history "
                "with these options at this place"
            )
    if scheme.fp32_gemm and not any(record.name == "fp32_gemm" for record in facts.history):
        raise CheckpointError("info: scheme fp32-gemm, but no pass fp32_gemm is in the history")


def _in_order(scheme: Scheme) -> list[tuple[str, Options]]:
    """The scheme's repairs with all of their options; those that need ranges run last."""
    repairs = resolve_repairs(scheme)
    ordered = sorted(repairs, key=lambda repair: repair.after_calibration)
    return [scan_repair(Scanner(str(repair))) for repair in ordered]


def _ran(record: PassRecord) -> tuple[str, Options]:
    try:
        name, options = scan_repair(Scanner(record.spelling or record.name))
    except SchemeError as error:
        raise CheckpointError(f"info: a pass {record.spelling[:80]!r} in the history") from error
    if name != record.name:
        raise CheckpointError(f"info: a pass {record.name[:80]!r} spelled {record.spelling[:80]!r}")
    return name, options


def _agree(options: Options, given: Options) -> bool:
    """Options that one version or the other does not know apart."""
    others = dict(given)
    return all(others.get(name, value) == value for name, value in options)
