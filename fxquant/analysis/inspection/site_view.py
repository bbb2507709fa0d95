"""One site on a page: its nodes, where they come from, its scales, its histograms."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.analysis.inspection.history import History
from fxquant.analysis.inspection.printer import HEAD, WIDTH, Section, lay_out, row
from fxquant.analysis.inspection.shapes import UNKNOWN, Value
from fxquant.analysis.inspection.summary import weight_scales
from fxquant.formats.integer import IntegerGrid
from fxquant.formats.scales import FP32
from fxquant.ir.graph import Site, info
from fxquant.ir.leaves import QuantizedParameters
from fxquant.ir.records import NodeText, SiteRecord
from fxquant.ir.streamed import check_present
from fxquant.schemes.scheme import Scheme

_BAR = 40
_ROWS = 20
_TICKS = 6
_NUMBERS = 2**20  # of a weight that are counted together


def site_view(gm: GraphModule, site: Site, history: History, values: Mapping[str, Value]) -> str:
    """The page of one site of a graph of any level."""
    facts = info(gm)
    own = [node for node in history.states[-1] if node.tag.site == site.path]
    records = [record for record in facts.site_records if record.path == site.path]
    specs = ", ".join(dict.fromkeys(record.spec for record in records)) or "not quantized"
    rows, columns = site.shape
    what = "two activations" if site.role == "matmul" else f"weight [{rows}, {columns}]"
    parts = [f"site {site.path}: {site.role}, {what}, {specs}"]
    parts += ["nodes\n" + _nodes(own, history, values)]
    parts += ["provenance\n" + "\n".join(_provenance(own, history))]
    module = None if site.role == "matmul" else gm.get_submodule(site.path)
    first = records[0] if records else None
    if isinstance(module, QuantizedParameters):
        check_present(gm)  # its scales are read
    lines = [_weight_scales(module, first)] if isinstance(module, QuantizedParameters) else []
    lines += [_static_range(record) for record in records if record.scale is not None]
    if lines:
        parts += ["scales\n" + "\n".join(lines)]
    parts += [_activation(record) for record in records if record.histogram]
    if isinstance(module, QuantizedParameters) and first is not None:
        parts += [_weight(module, site, first)]
    notes = [f"{note.origin}: {note.text}" for note in facts.notes if note.site == site.path]
    if notes:
        parts += ["notes\n" + "\n".join(notes)]
    return "\n\n".join(parts)


def _nodes(own: Sequence[NodeText], history: History, values: Mapping[str, Value]) -> str:
    """Every node, buffers too: here they are the subject."""
    block = next((s for s in history.sections(-1) if own and own[0] in s.nodes), None)
    names = history.names(block or Section("", "", ()), values)
    found = [row(node, names, values.get(node.name, UNKNOWN)) for node in own]
    return "\n".join(lay_out([HEAD, *found]))


def _provenance(own: Sequence[NodeText], history: History) -> list[str]:
    """From the trace on: ``integerize: x_dq, w, y -> acc, rescaled, y``, a line a step."""
    pending, every = list(own), dict.fromkeys(own)
    while pending:
        found = [source for node in pending for source in history.sources(node)]
        pending = [node for node in dict.fromkeys(found) if node not in every]
        every.update(dict.fromkeys(pending))
    steps: dict[tuple[int, str, tuple[NodeText, ...]], list[NodeText]] = {}
    for node in every:
        step = (history.born(node), node.tag.origin, tuple(history.sources(node)))
        steps.setdefault(step, []).append(node)
    names = history.names(Section("", "", ()), {})

    def called(nodes: Iterable[NodeText]) -> str:
        return ", ".join(names.local(node) or node.target for node in nodes)

    lines = (
        f"{origin}: {called(sources)} -> {called(made)}" if sources else f"{origin}: {called(made)}"
        for (_, origin, sources), made in sorted(steps.items(), key=lambda step: step[0][0])
    )
    return [textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines]


def _weight_scales(module: QuantizedParameters, record: SiteRecord | None) -> str:
    values, kept, shared = weight_scales(module, record)
    scale = values.float().reshape(-1).sort().values  # quantile takes 2**24 values at most
    middle = float(scale[(scale.numel() - 1) // 2] + scale[scale.numel() // 2]) / 2
    low, high = float(scale[0]), float(scale[-1])
    text = f"weight: {scale.numel()} scales, smallest {low:.3g}, median {middle:.3g}, "
    text += f"largest {high:.3g}" + ("" if kept == FP32 else f", each kept in {kept.name}")
    text += "" if shared is None else f" under {float(shared):.3g} for all"
    sqnr = None if record is None else record.weight_sqnr
    return text if sqnr is None else f"{text}; SQNR {sqnr:.1f} dB"


def _static_range(record: SiteRecord) -> str:
    return (
        f"{record.operand or 'input'}: scale {record.scale:.6g}, zero point {record.zero_point}, "
        f"range {record.low:.4g}..{record.high:.4g} by {record.estimator}; calibration saw "
        f"{record.seen_low:.4g}..{record.seen_high:.4g}, {record.clipped:.3%} outside"
    )


def _activation(record: SiteRecord) -> str:
    assert record.seen_low is not None
    assert record.seen_high is not None
    assert record.low is not None
    assert record.high is not None
    bins = len(record.histogram)
    merge = max(1, bins // _ROWS)
    counts = [sum(record.histogram[i : i + merge]) for i in range(0, bins, merge)]
    step = (record.seen_high - record.seen_low) / len(counts)
    name, numbers = _numbers(record)
    lines, drawn = [], 0
    for index, count in enumerate(counts):
        start, end = record.seen_low + index * step, record.seen_low + (index + 1) * step
        outside = end <= record.low or start >= record.high
        last = index == len(counts) - 1
        here = sum(start <= v < end or (last and v == end) for v in numbers)
        drawn += here
        label = f"{start:10.3g} {_ticks(here)}"
        lines.append(_bar(label, count, max(counts), "x" if outside else "#"))
    head = f"{record.operand or 'input'} in calibration "
    head += "(bars logarithmic; # inside the range, x outside; "
    head += f"in front a - for each number of {name}, {drawn} of {len(numbers)} there)"
    return "\n".join([textwrap.fill(head, WIDTH, subsequent_indent="  "), *lines])


def _numbers(record: SiteRecord) -> tuple[str, list[float]]:
    """The grid of a static input, and the values that its numbers stand for."""
    spec = Scheme.parse(f"w8/{record.spec}" if record.operand else record.spec).spec
    assert spec.activation is not None
    assert record.scale is not None
    grid, zero = spec.activation.tensor.grid, record.zero_point or 0
    return grid.name, [(level - zero) * record.scale for level in grid.levels]


def _ticks(count: int) -> str:
    """One a number, or how many where they are too many to draw."""
    return f"{'-' * count if count <= _TICKS else f'{count} -':>{_TICKS}}"


def _weight(module: QuantizedParameters, site: Site, record: SiteRecord) -> str:
    spec = Scheme.parse(record.spec).spec.weight
    assert spec is not None
    stored: Tensor = module.get_buffer("weight").detach()
    levels = torch.tensor(spec.grid.levels, device=stored.device)
    width = math.ceil(len(levels) / _ROWS)
    total = torch.zeros(math.ceil(len(levels) / width), dtype=torch.int64, device=stored.device)
    for rows in stored.split(max(1, _NUMBERS // max(1, site.shape[1]))):
        numbers = spec.grid.decode(spec.grid.unpack(rows, site.shape[1])).reshape(-1)
        places = torch.searchsorted(levels, numbers) // width
        total += torch.bincount(places, minlength=len(total))
    counts = total.tolist()
    lines = [
        _bar(f"{spec.grid.levels[i * width]:10.4g}", count, max(counts), "#")
        for i, count in enumerate(counts)
    ]
    what = "codes" if isinstance(spec.grid, IntegerGrid) else f"{spec.grid.name} numbers"
    return "\n".join([f"{what} of the weight (bars logarithmic)", *lines])


def _bar(label: str, count: int, most: int, mark: str) -> str:
    length = round(_BAR * math.log1p(count) / math.log1p(most)) if most else 0
    return f"{label} |{mark * length:<{_BAR}}| {count}"
