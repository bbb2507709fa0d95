"""The facts of a graph's printout as plain data: header, history, sites, what stayed in float."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule

from fxquant.formats.scales import FP32, ScaleFormat
from fxquant.ir.blocks import block_of
from fxquant.ir.calibration import Calibration
from fxquant.ir.coverage import float_share
from fxquant.ir.graph import GraphInfo, LeftInFloat, Note, PassRecord, Site, SiteRecord, info
from fxquant.ir.leaves import QuantizedParameters
from fxquant.ir.size import Bytes, bits_per_weight, bytes_by_dtype
from fxquant.ir.streamed import check_present
from fxquant.numerics.weight_codes import GLOBAL_SCALE
from fxquant.schemes.scheme import Scheme


@dataclass(frozen=True)
class SiteRow:
    """A site, or the sites of all blocks that do the same there.

    Attributes:
        path: with ``*`` for the block's number where ``count`` is above 1.
        scales: smallest and largest scale of the weight; None in float.
        records: what quantize decided, one a site (two a product); empty in float.
    """

    path: str
    count: int
    site: Site
    spec: str
    scales: tuple[float, float] | None
    records: tuple[SiteRecord, ...]


@dataclass(frozen=True)
class Summary:
    """What ``print(inspect(gm))`` shows; bytes are by dtype. ``float_share``: of the blocks'
    weights, what stays in float, nan where nothing is codes."""

    model: str
    scheme: str
    level: str
    parameters: int
    bytes_before: Bytes
    bytes_after: Bytes
    bits_per_weight: float
    float_share: float
    history: tuple[PassRecord, ...]
    sites: tuple[SiteRow, ...]
    left_in_float: tuple[LeftInFloat, ...]
    notes: tuple[Note, ...]
    calibration: Calibration
    weights: str
    frontend: str


def summarize(gm: GraphModule, *, fold: bool = True) -> Summary:
    """The Summary of a graph of any level; ``fold`` counts like sites of the blocks together."""
    facts = info(gm)
    past = facts.calibration
    found = [_site_row(gm, site, facts) for site in facts.sites]
    return Summary(
        model=facts.model,
        scheme=facts.scheme,
        level=str(facts.level),
        parameters=facts.parameters,
        bytes_before=facts.float_bytes,
        bytes_after=bytes_by_dtype((*gm.parameters(), *gm.buffers())),
        bits_per_weight=bits_per_weight(gm),
        float_share=float_share(gm),
        history=facts.history,
        sites=tuple(_folded(found, facts.blocks) if fold else found),
        left_in_float=facts.left_in_float,
        notes=facts.notes,
        calibration=None if past is None else tuple(record.brief() for record in past),
        weights=facts.weights,
        frontend=facts.frontend,
    )


def _site_row(gm: GraphModule, site: Site, facts: GraphInfo) -> SiteRow:
    records = tuple(record for record in facts.site_records if record.path == site.path)
    scales = None
    if site.role != "matmul" and isinstance(
        module := gm.get_submodule(site.path), QuantizedParameters
    ):
        if module.get_buffer("weight_scale").is_meta:
            check_present(gm)
        scale, _, _ = weight_scales(module, records[0] if records else None)
        scales = (float(scale.min()), float(scale.max()))
    return SiteRow(site.path, 1, site, records[0].spec if records else "fp", scales, records)


def weight_scales(
    module: QuantizedParameters, record: SiteRecord | None
) -> tuple[Tensor, ScaleFormat, Tensor | None]:
    """The scales of a site's weight, float32, how they are kept, and what they share."""
    stored = module.get_buffer("weight_scale").detach()
    spec = None if record is None else Scheme.parse(record.spec).spec.weight
    kept = FP32 if spec is None else spec.scale
    shared = module.get_buffer(GLOBAL_SCALE).detach() if kept.two_level else None
    return kept.decode(stored, shared), kept, shared


def _folded(found: Sequence[SiteRow], blocks: Sequence[str]) -> list[SiteRow]:
    groups: dict[tuple[object, ...], list[SiteRow]] = {}
    for row in found:
        key = (starred(row.path, blocks), row.site.shape, row.spec)
        groups.setdefault(key, []).append(row)
    return [
        group[0] if len(group) == 1 else _merged(starred(group[0].path, blocks), group)
        for group in groups.values()
    ]


def _merged(path: str, group: Sequence[SiteRow]) -> SiteRow:
    scales = [row.scales for row in group if row.scales is not None]
    ends = (min(low for low, _ in scales), max(high for _, high in scales)) if scales else None
    records = tuple(record for row in group for record in row.records)
    return SiteRow(path, len(group), group[0].site, group[0].spec, ends, records)


def starred(path: str, blocks: Sequence[str]) -> str:
    """The path with ``*`` for the block's number: ``model.layers.*.mlp.up_proj``."""
    block = block_of(path, blocks)
    return path if block is None else f"{block.rpartition('.')[0]}.*{path.removeprefix(block)}"


def span(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Smallest and largest of the values that are known and no NaN."""
    known = [v for v in values if v is not None and not math.isnan(v)]
    return (min(known), max(known)) if known else None
