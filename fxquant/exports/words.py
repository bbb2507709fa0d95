"""Checkpoints of words, as AutoGPTQ and AutoAWQ lay them out: what both can hold, and the words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.errors import ExportError
from fxquant.exports.half_scales import in_half, scale_refusal
from fxquant.exports.module_refusals import kind_refusal, repair_refusal
from fxquant.exports.modules import check_modules
from fxquant.exports.sites import CodedSite, coded_sites, groups
from fxquant.exports.target import Refusal, Target, nearest_group
from fxquant.formats.integer import IntegerGrid
from fxquant.ir.graph import Level, Site
from fxquant.schemes.specs import SiteSpec
from fxquant.schemes.spelling import spell_site

WORD: Final = 32  # bits
Specs = Sequence[tuple[Site, SiteSpec]]


def refusal(gm: GraphModule, site: Site, spec: SiteSpec, bits: tuple[int, ...]) -> Refusal | None:
    """Why words of codes of ``bits`` cannot hold ``spec`` at ``site``."""
    weight = spec.weight
    assert weight is not None
    if site.role != "linear":
        return Refusal(f"engines read the {site.role} in float", "fp there")
    if spec.activation is not None:
        return Refusal("its engines run inputs in float", "w4-g128")
    if not isinstance(weight.grid, IntegerGrid) or weight.grid.bits not in bits:
        known = ", ".join(map(str, bits))
        return Refusal(f"its codes are integers of {known} bits, not {weight.grid.name}", "w4-g128")
    kept = scale_refusal(weight) or nearest_group(weight, site.shape[1])
    if kept is not None:
        return kept
    rows, columns = site.shape
    if rows % WORD or columns % WORD:
        reason = f"words of {WORD} bits do not divide its {rows} rows and {columns} columns"
        return Refusal(reason, "compressed-tensors (--to compressed-tensors)")
    return None


def target_of_words(name: str, bits: tuple[int, ...], whole: bool) -> Target:
    """A format of words of codes of ``bits``; ``whole`` as in ``check_alike``."""
    attention = "it codes weights of linears, and nothing of attention"
    row = "a linear has codes or floats there, not some columns of each"
    return Target(
        name,
        Level.QDQ,
        needs_codes=True,
        check_site=partial(refusal, bits=bits),
        check_graph=partial(check_modules, name),
        never={"attn8": attention, "kv8": attention, "kv4": attention, "split_outliers": row},
        check_specs=partial(check_alike, name, whole=whole),
        check_kinds=kind_refusal,
        check_repairs=repair_refusal,
    )


def check_alike(target: str, specs: Specs, whole: bool) -> None:
    """Raise ExportError where weights differ in what the format says once for all.

    ``whole``: whether no linear of a block may stay in float.
    """
    coded = [(site, spec) for site, spec in specs if spec.weight is not None]
    for site, spec in coded:
        first = coded[0][1]
        if spec != first:
            raise ExportError(
                f"{target} cannot hold {site.path} ({spell_site(spec)}): it says once for all how "
                f"codes are kept, and {coded[0][0].path} has {spell_site(first)}; nearest that it "
                f"can: {spell_site(first)}"
            )
    _check_one_size(target, coded)
    for site, spec in specs:
        if whole and coded and spec.weight is None and site.role == "linear":
            raise ExportError(
                f"{target} cannot hold {site.path} in float: it codes every linear of the blocks; "
                f"nearest that it can: {spell_site(coded[0][1])}"
            )


def _check_one_size(target: str, coded: Specs) -> None:
    """Raise ExportError where the size of groups that the longest rows need fits others not."""
    weight = coded[0][1].weight if coded else None
    size = None if weight is None else weight.group_size
    if weight is None or size is None or max(site.shape[1] for site, _ in coded) <= size:
        return
    for site, spec in coded:
        if site.shape[1] % size:
            fits = math.gcd(size, *(each.shape[1] for each, _ in coded))
            nearest = spell_site(replace(spec, weight=replace(weight, group_size=fits)))
            raise ExportError(
                f"{target} cannot hold {site.path} ({spell_site(spec)}): it says once for all how "
                f"long a group is, and {size} does not divide its {site.shape[1]} columns; nearest "
                f"that it can: {nearest}"
            )


def common_group_size(gm: GraphModule) -> int:
    """What the file says for all its linears, by the longest rows: in others one group is a row.
    -1 where a row has one scale."""
    sites = list(coded_sites(gm))
    return groups(sites[0].weight_spec, max(site.site.shape[1] for site in sites)) or -1


def lifted(site: CodedSite) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes [N, K] from 0 up, int64 zero points [N, G] likewise, scales fp16 [N, G]."""
    held = in_half(site.codes(), site.path)
    shift = 2 ** (held.spec.grid.bits - 1)
    rows = held.codes.shape[0]
    scales = held.scales.expand(rows, 1) if held.scales.dim() == 0 else held.scales
    zeros = torch.zeros((), dtype=torch.int64) if held.zero_points is None else held.zero_points
    return (
        (held.codes.to(torch.int16) + shift).to(torch.uint8),
        zeros.to(torch.int64).expand(scales.shape) + shift,
        scales.to(torch.float16),
    )


def words(numbers: Tensor, bits: int) -> Tensor:
    """Numbers of ``bits`` bits, integers [R, C], as a stream of bits in words, int32
    [R, C bits / 32], the first lowest; C bits a multiple of 32.

    >>> [hex(word) for word in words(torch.arange(32)[None] % 8, 4)[0]]
    ['0x76543210', '0x76543210', '0x76543210', '0x76543210']
    """
    shared = math.gcd(bits, WORD)
    parts = numbers.unflatten(1, (-1, WORD // shared))  # what fills whole words
    found = torch.zeros((*parts.shape[:2], bits // shared), dtype=torch.int64)
    for place in range(parts.shape[-1]):  # one by one: all bits at once would take 64 times as much
        number, (word, shift) = parts[..., place].to(torch.int64), divmod(place * bits, WORD)
        found[..., word] |= (number << shift) & (2**WORD - 1)
        if shift + bits > WORD:
            found[..., word + 1] |= number >> (WORD - shift)
    found = found.flatten(1)
    return torch.where(found >= 2**31, found - 2**32, found).to(torch.int32)
