"""What each of Triton's kernels is asked before the first call is its: the bits of plain operators.

A kernel is compiled for each dtype, for each set of operands that may be missing, for the block or
tile that its sizes ask for, and apart where they are 1 or multiples of 16. Each is asked for
itself, when a call of its kind first comes: what no call needs is not compiled. Nothing else has
code of its own: rows, strides and counts of groups are told to Triton as plain numbers
(``do_not_specialize``), and tensors are in one piece where they should begin (``tiles.laid_out``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.formats.packing import pack_int4
from fxquant.numerics import gemm, quantization
from fxquant.numerics.kernels import tiles

ROWS, COLUMNS = 40, 72


@dataclass(frozen=True)
class Kind:
    """What is asked apart. ``dtype``: of the input, or of the result where that is codes.

    ``token``: a range for each row; ``shifted``: the input has zero points, ``weight_shifted``: the
    weight has; ``ends``: the smallest and the largest code; ``rows``, ``depth``: of a tile, where
    codes are multiplied; ``block``: of a row, where they are not; ``length``, ``columns``,
    ``group``: what K, N where there is one, and a group of K are compiled as (``tiles.multiple``);
    ``bias``: its dtype; ``turned``: the right matrix of a product lies in memory as [N, K].
    """

    operator: str
    dtype: torch.dtype
    token: bool = True
    packed: bool = False
    shifted: bool = False
    weight_shifted: bool = False
    bias: torch.dtype | None = None
    ends: tuple[int, int] = (-128, 127)
    rows: int = 64
    depth: int = 64
    block: int = 256
    length: int = 0
    columns: int = 0
    group: int = 16
    turned: bool = False


def differs(kind: Kind, device: torch.device) -> bool:
    """Whether Triton gives other bits there than plain operators, on numbers that would show it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, _length(kind), generator=generator).mul_(3)
    x[1] *= 1e-42 if kind.dtype == torch.float32 else 1e-5
    x[2] = x[2].mul_(4).round_().mul_(0.5)
    x[2, 0] = kind.ends[1]  # under a scale near 1 many quotients are ties
    x = x.to(kind.dtype).to(device)
    if kind.operator == "quantize_rows":
        return _rows_differ(kind, x)
    if kind.operator == "quantize_static":
        return _static_differs(kind, x)
    if kind.operator == "int_product":
        return _matrices_differ(kind, x, generator)
    return _products_differ(kind, x, generator)


def _size(near: int, multiple: int) -> int:
    """1; the size down to a multiple of 16, where its tile is the same; or one that is none."""
    if multiple == 1:
        return 1
    return near // 16 * 16 if multiple else near + (near % 16 == 0)


def _group(kind: Kind) -> int:
    """Of the kind's tile; where it is no multiple of 16 still of whole bytes, packed."""
    return 1 if kind.group == 1 else kind.depth + (0 if kind.group else 4)


def _length(kind: Kind) -> int:
    """Of rows that the kind's block is for: it holds one, or is the largest and takes two steps."""
    largest = tiles.weight_block if kind.operator == "dequant_linear" else tiles.row_block
    near = kind.block * (25 if kind.block == largest(2**20) else 12) // 16
    return _size(near, kind.length)


def _same(found: Any, wanted: Any) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def _rows_differ(kind: Kind, x: Tensor) -> bool:
    from fxquant.numerics.kernels import triton_quantize

    symmetric, grain = not kind.shifted, "token" if kind.token else "tensor"
    scale, zero = quantization.choose_qparams(x, *kind.ends, symmetric=symmetric, granularity=grain)
    codes = quantization.encode(x, scale, None if symmetric else zero, *kind.ends)
    found = triton_quantize.quantize_rows(x, grain, symmetric, *kind.ends)
    return not _same(found[:3], (codes, scale, zero))


def _static_differs(kind: Kind, x: Tensor) -> bool:
    from fxquant.numerics.kernels import triton_quantize

    scale = x.abs().amax().to(torch.float32) / (1.5 * kind.ends[1])  # some are clipped
    zero = torch.full((), 3, dtype=torch.int32, device=x.device) if kind.shifted else None
    found = triton_quantize.quantize_static(x, scale, zero, *kind.ends)
    return not _same(found[:1], (quantization.encode(x, scale, zero, *kind.ends),))


def _matrices_differ(kind: Kind, x: Tensor, generator: torch.Generator) -> bool:
    """Sizes that the kind's tile is for."""
    from fxquant.numerics.kernels import triton_gemm

    height, length = kind.rows * 5 // 8, _size(kind.depth * 25 // 16, kind.length)
    across = _size(COLUMNS, kind.columns)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=generator).to(torch.int8).to(x.device)

    left = whole(2, height, length)
    right = whole(2, across, length).mT if kind.turned else whole(2, length, across)
    rows = torch.rand(2, height, 1, generator=generator).to(x.device)
    columns = torch.rand(2, 1, across, generator=generator).to(x.device)
    exact = left.cpu().to(torch.int64) @ right.cpu().to(torch.int64)
    wanted = exact.to(x.device, torch.int32).to(torch.float32) * rows * columns
    found = triton_gemm.int_product(left, right, rows, columns, x.new_zeros(2, height, 1))
    return not torch.equal(found, wanted.to(kind.dtype))


def _products_differ(kind: Kind, x: Tensor, generator: torch.Generator) -> bool:
    """Sizes that the kind's tile is for: two steps along K, or four groups; the last is short."""
    from fxquant.numerics.kernels import triton_gemm

    group = 0 if kind.operator == "int_linear" else _group(kind)
    rows, columns = kind.rows * 5 // 8, _size(COLUMNS, kind.columns)
    length = _size(kind.depth * 25 // (8 if group else 16), kind.length)
    if kind.operator == "dequant_linear":
        length = _length(kind)
    groups = quantization.group_count(length, group) if group else 1

    def whole(low: int, high: int, *shape: int) -> Tensor:
        found = torch.randint(low, high + 1, shape, generator=generator)
        return found.to(torch.int32).to(x.device)

    low, high = (-8, 7) if kind.packed else (-128, 127)
    weight = whole(low, high, columns, length).to(torch.int8)
    stored = pack_int4(weight) if kind.packed else weight
    scales = torch.rand(columns, groups, generator=generator).mul_(0.01).to(x.device)
    shift = whole(-8, 8, columns, groups) if kind.weight_shifted else None
    if kind.operator == "dequant_linear":
        found = triton_gemm.dequantized_weight(
            stored, scales, shift, length, group, kind.packed, kind.dtype
        )
        numbers = quantization.dequantize(weight, scales, shift, group_size=group)
        return not torch.equal(found, numbers.to(kind.dtype))
    codes = whole(-128, 127, rows, length).to(torch.int8)
    scale = torch.rand(rows, 1, generator=generator).to(x.device)
    zero = whole(-128, 127, rows, 1) if kind.shifted else None
    sums = whole(-999, 999, columns, groups) if kind.shifted else None
    bias = None
    if kind.bias is not None:
        bias = torch.randn(columns, generator=generator).to(x.device, kind.bias)
    nan = x.new_zeros(rows, 1)
    run = triton_gemm.grouped_int_linear if group else triton_gemm.int_linear
    given = sums if sums is None or group else sums.flatten()
    found = run(codes, stored, scale, scales, zero, given, shift, bias, nan, group, kind.packed)
    total = _sums(codes, weight, scales, zero, sums, shift, group)
    wanted = total * scale if group else total * scale * scales.flatten()
    wanted = wanted if bias is None else wanted + bias.to(torch.float32)
    return not torch.equal(found, wanted.to(kind.dtype))


def _sums(
    codes: Tensor,
    weight: Tensor,
    scales: Tensor,
    zero: Tensor | None,
    sums: Tensor | None,
    shift: Tensor | None,
    group: int,
) -> Tensor:
    """float32 [M, N]: corrected int32 sums; those of groups under their scales, added in order."""
    total: Tensor | None = None
    size = group or codes.shape[1]
    pairs = zip(codes.split(size, 1), weight.split(size, 1), strict=True)
    for g, (left, right) in enumerate(pairs):
        part = gemm.reference_int_gemm(left.cpu(), right.cpu()).to(codes.device, torch.int32)
        if zero is not None and sums is not None:
            part = part - zero * sums.select(1, g)
        if shift is not None:
            part = part - shift.select(1, g) * left.sum(-1, keepdim=True, dtype=torch.int32)
        wide = part.to(torch.float32)
        if not group:
            return wide
        wide = wide * scales.select(1, g)
        total = wide if total is None else total + wide
    assert total is not None
    return total
