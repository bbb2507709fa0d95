"""What a saved graph's GraphInfo may say: plain facts, within what they describe."""

from __future__ import annotations

import json

from fxquant.checkpoint.saved_names import check_path
from fxquant.errors import CheckpointError
from fxquant.ir.calibration import CalibrationRecord, Spans
from fxquant.ir.graph import GraphInfo
from fxquant.ir.token_runs import KnownRuns
from fxquant.schemes.scheme import ROLES, Scheme

_LARGEST = 2**48  # of a count: more bytes than any model has


def check_info(facts: GraphInfo) -> None:
    """Raise CheckpointError for a count out of bounds, a path that is none, a scheme, site or
    calibration record that cannot be; SchemeError for a scheme that does not parse."""
    counts = [facts.vocab_size, facts.parameters, *(size for _, size in facts.float_bytes)]
    counts += [extent for site in facts.sites for extent in site.shape]
    counts += [] if facts.max_positions is None else [facts.max_positions]
    if not all(0 <= count < _LARGEST for count in counts):
        raise CheckpointError("info: a count is negative or larger than any model's")
    if facts.vocab_size < 1 or facts.max_positions == 0:
        raise CheckpointError("info: no vocabulary or no positions")
    Scheme.parse(facts.scheme)
    named = [path for path in (facts.head, facts.embeddings) if path is not None]
    for path in (*facts.blocks, *named, *(site.path for site in facts.sites)):
        check_path(path, "info")
    for paths in (facts.blocks, [site.path for site in facts.sites]):
        if len(set(paths)) < len(paths):
            raise CheckpointError("info: a block or site is listed twice")
    if not all(site.role in ROLES for site in facts.sites):
        raise CheckpointError(f"info: a site's role is not one of {', '.join(ROLES)}")
    for record in facts.calibration or ():
        _check_record(record)
    try:
        whole = isinstance(json.loads(facts.config or "{}"), dict)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError("info: the model's config is not a JSON object")


def _check_record(record: CalibrationRecord) -> None:
    drawn = Spans() if record.origin is None else record.origin.spans
    known = range(len(drawn.texts))
    if not all(text in known and 0 <= first < end for text, first, end in drawn.spans):
        raise CheckpointError("info: a calibration window lies in no listed text, or ends first")
    try:
        KnownRuns.read(record.runs)
    except ValueError as error:
        raise CheckpointError("info: the runs of a calibration are no hashes") from error
