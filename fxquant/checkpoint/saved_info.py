"""What a saved graph's GraphInfo may say: plain facts, within what they describe."""

from __future__ import annotations

from fxquant.checkpoint.saved_names import check_path
from fxquant.checkpoint.saved_specs import check_specs
from fxquant.checkpoint.size_rule import LONGEST
from fxquant.errors import CheckpointError
from fxquant.files.doors import parse_json, reason
from fxquant.ir.calibration import CalibrationRecord, Spans
from fxquant.ir.graph import GraphInfo, Level
from fxquant.ir.token_runs import KnownRuns
from fxquant.schemes.scheme import ROLES

_LARGEST = 2**48  # of a count: more bytes than any model has


def check_info(facts: GraphInfo) -> None:
    """Raise CheckpointError for a level that is not saved, a count out of bounds, a path that is
    none, a scheme, site or calibration record that cannot be; SchemeError for a scheme that does
    not parse."""
    if facts.level in (Level.KERNELS, Level.INEXACT):
        raise CheckpointError(
            f"info: a graph of level {facts.level} is not saved: save it at level integer, from "
            "which fxquant.passes.FuseKernels()(fxquant.load(path)) makes level kernels again, "
            "bit for bit"
            + (", and FuseFp8() this one from that" if facts.level == Level.INEXACT else "")
        )
    counts = [facts.vocab_size, facts.parameters, *(size for _, size in facts.float_bytes)]
    counts += [extent for site in facts.sites for extent in site.shape]
    if not all(0 <= count < _LARGEST for count in counts):
        raise CheckpointError("info: a count is negative or larger than any model's")
    positions = facts.max_positions
    if facts.vocab_size < 1 or not (positions is None or 1 <= positions <= LONGEST):
        raise CheckpointError(
            f"info: a vocabulary of {facts.vocab_size}, {positions} positions: models have 1 to "
            f"{LONGEST}, or no limit"
        )
    named = [path for path in (facts.head, facts.embeddings) if path is not None]
    for path in (*facts.blocks, *named, *(site.path for site in facts.sites)):
        check_path(path, "info")
    for paths in (facts.blocks, [site.path for site in facts.sites]):
        if len(set(paths)) < len(paths):
            raise CheckpointError("info: a block or site is listed twice")
    if not all(site.role in ROLES for site in facts.sites):
        raise CheckpointError(f"info: a site's role is not one of {', '.join(ROLES)}")
    check_specs(facts)
    for record in facts.calibration or ():
        _check_record(record)
    _check_config(facts)


def _check_config(facts: GraphInfo) -> None:
    try:
        config = parse_json(facts.config or "{}")
    except ValueError as error:
        raise CheckpointError(f"info: the model's config is no JSON: {reason(error)}") from error
    if not isinstance(config, dict):
        raise CheckpointError("info: the model's config is not a JSON object")
    positions = config.get("max_position_embeddings")
    if type(positions) is int and positions != facts.max_positions:
        raise CheckpointError(
            f"info: {facts.max_positions} positions, but {positions} in the model's config"
        )


def _check_record(record: CalibrationRecord) -> None:
    drawn = Spans() if record.origin is None else record.origin.spans
    known = range(len(drawn.texts))
    if not all(text in known and 0 <= first < end for text, first, end in drawn.spans):
        raise CheckpointError("info: a calibration window lies in no listed text, or ends first")
    try:
        KnownRuns.read(record.runs)
    except ValueError as error:
        raise CheckpointError("info: the runs of a calibration are no hashes") from error
