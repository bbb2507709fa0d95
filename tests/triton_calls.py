"""Triton's kernels against the plain operators, in a process of its own: Triton asks how it is to
run when it is imported.

    TRITON_INTERPRET=1 python -m tests.triton_calls agree FIRST LAST    calls of these seeds
    TRITON_INTERPRET=1 python -m tests.triton_calls first EVERY         what precedes the first call
    TRITON_INTERPRET=1 python -m tests.triton_calls tiles EVERY         the same for each tile
    python -m tests.triton_calls compiled 80 90                         machine code, without a GPU
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import OutOfResources

from fxquant.formats.packing import unpack_int4
from fxquant.ir import fused, operators
from fxquant.numerics import quantization
from fxquant.numerics.kernels import cuda, first_test, table, tiles, triton_gemm, triton_quantize
from fxquant.numerics.kernels.first_test import Kind
from tests.fused_calls import BRAIN, DTYPES, GRAINS, HALF, SINGLE, Calls, same

LEADS = ((), (3,), (2, 5), (37,), (0,), (1,))


def calls(seed: int, dtype: torch.dtype) -> Iterator[tuple[str, Any, Any]]:
    """Name, what Triton gives and what the composition gives, on random operands."""
    calls = Calls(seed, (*LEADS[seed % len(LEADS)], 1 + seed * 37 % 197), dtype)
    x, columns, group = calls.input(), 1 + seed * 29 % 61, 2 * (1 + seed * 11 % 70)
    for grain in GRAINS if x.numel() else ("token",):
        for symmetric, qmin in ((True, -127), (False, -128)):
            operands = (x, grain, symmetric, qmin, 127)
            codes, scale, zero, nan = triton_quantize.quantize_rows(*operands)
            wanted = fused.quantize_rows(*operands)
            # NaN as an int32 is what the device makes of it, and codes follow from a zero point.
            finite = scale.isfinite()
            known = finite | symmetric
            ours = (codes * known, scale, zero * finite, nan)
            wanted = (wanted[0] * known, wanted[1], wanted[2] * finite, wanted[3])
            yield "quantize_rows", ours, wanted
    if x.numel():
        yield "quantize_rows", *infinite(x)
    for shift in (None, torch.tensor(5, dtype=torch.int32)):
        static = (x, torch.tensor(0.013), shift, -128, 127)
        found = triton_quantize.quantize_static(*static)
        yield "quantize_static", found, fused.quantize_static(*static)
    product = matrices(seed, dtype)
    yield "int_product", triton_gemm.int_product(*product), fused.int_product(*product)
    for packed in (False, True):
        for size, name in ((0, "int_linear"), (group, "grouped_int_linear")):
            site = calls.site(columns, size, packed)
            if dtype == BRAIN:  # the interpreter's cast to bf16 truncates: compared before it
                site = (*site[:8], site[8].float())
            found = getattr(triton_gemm, name)(*site, size, packed)
            yield name, found, getattr(fused, name)(*site, size or 1024, packed)
            yield "weight", *weights(calls.weight_only(columns, size, packed), dtype)


def infinite(x: Tensor) -> tuple[Any, Any]:
    """Rows that hold an infinity, or both, as on CUDA, whose int32 of NaN is 0."""
    x = x.nan_to_num().clone()
    x[..., -1] = x[..., -1].abs() * torch.inf  # NaN where it was 0
    x[..., 0] = -torch.inf
    codes, scale, zero, nan = triton_quantize.quantize_rows(x, "token", False, -128, 127)
    wanted_scale, _ = quantization.choose_qparams(
        x, -128, 127, symmetric=False, granularity="token"
    )
    none = torch.zeros_like(wanted_scale, dtype=torch.int32)
    wanted = quantization.encode(x, wanted_scale, none, -128, 127)
    wanted_nan = quantization.nan_rows(x).to(x.dtype)
    return (codes, scale, zero, nan), (wanted, wanted_scale, none, wanted_nan)


def matrices(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    shaped = Calls(seed, (1 + seed % 2, seed % 3, 1 + seed * 13 % 70), dtype)
    *codes, nan = shaped.product(1 + seed * 37 % 150, 1 + seed * 29 % 61)
    return (*codes, nan.float() if dtype == BRAIN else nan)


def weights(operands: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, stored, scale, shift, _, size, packed = operands
    scale = scale.expand(stored.shape[0], -1) if scale.dim() else scale.expand(stored.shape[0], 1)
    shift = None if shift is None else shift.expand(scale.shape)
    length, wide = x.shape[-1], SINGLE if dtype == BRAIN else dtype
    found = triton_gemm.dequantized_weight(stored, scale, shift, length, size, packed, wide)
    codes = unpack_int4(stored, length) if packed else stored
    return found, operators.dequantize(codes, scale, shift, size, x.new_empty(0, dtype=wide))


OPERATORS = ("int_linear", "grouped_int_linear", "dequant_linear")
KINDS = tuple(
    Kind(operator, dtype, packed=packed, shifted=shifted, weight_shifted=shift, bias=bias)
    for operator in OPERATORS
    for dtype in (SINGLE, HALF)  # the interpreter's cast to bf16 truncates
    for packed in (False, True)
    for shifted, shift, bias in ((False, False, None), (True, False, SINGLE), (False, True, HALF))
)
KINDS += tuple(
    Kind("quantize_rows", dtype, token, shifted=shifted, ends=ends)
    for dtype in DTYPES
    for token in (False, True)
    for shifted, ends in ((False, (-127, 127)), (True, (-8, 7)))
)
KINDS += tuple(Kind("int_product", dtype) for dtype in (SINGLE, HALF))
KINDS += tuple(
    Kind(operator, SINGLE, block=block, length=whole)
    for operator, largest in (("quantize_rows", 4096), ("dequant_linear", 1024))
    for block in (128, 512, largest)
    for whole in (0, 16)
)
KINDS += tuple(
    Kind(operator, HALF, packed=operator != "int_product", length=length, columns=columns)
    for operator in ("int_linear", "grouped_int_linear", "int_product")
    for length, columns in ((16, 0), (0, 16), (16, 16), (1, 16), (16, 1))
)
KINDS += tuple(
    Kind(operator, SINGLE, group=group, depth=32)
    for operator in ("grouped_int_linear", "dequant_linear")
    for group in (0, 1)
)
KINDS += tuple(Kind("int_product", SINGLE, length=length, turned=True) for length in (0, 16))
KINDS += tuple(Kind("quantize_static", dtype, shifted=s) for dtype in DTYPES for s in (False, True))


def planted() -> Iterator[tuple[str, Any, Callable[[Kind], bool]]]:
    """Mistakes in what is compiled: what it is, how it is made, the kinds that have it."""
    multiply, weight = triton_gemm._multiply, triton_gemm.dequantized_weight

    def of_products(change: Callable[[list[Any]], object]) -> Any:
        def run(*operands: Any) -> Tensor:
            changed = list(operands)
            change(changed)
            return multiply(*changed)

        return mock.patch.object(triton_gemm, "_multiply", run)

    def nibbles(operands: list[Any]) -> None:
        if operands[10]:
            operands[1] = (operands[1] >> 4 & 15 | operands[1] << 4).to(operands[1].dtype)

    def ends(*operands: Any) -> Tensor:
        found = multiply(*operands)
        step = torch.where(found == found.amax(), torch.finfo(HALF).eps * found, 0)
        return found + step if found.dtype == HALF else found

    def unshifted(*operands: Any) -> Tensor:
        given: tuple[Any, ...] = (*operands[:2], None, *operands[3:])
        return weight(*given)

    product = frozenset(OPERATORS[:2])
    yield (
        "strides",
        mock.patch.object(triton_gemm, "_stride", return_value=0),
        lambda kind: kind.operator in product,
    )
    yield (
        "no weight zero points",
        of_products(lambda given: given.__setitem__(6, None)),
        lambda kind: kind.operator in product and kind.weight_shifted,
    )
    yield (
        "codes of a byte changed over",
        of_products(nibbles),
        lambda kind: kind.operator in product and kind.packed,
    )
    yield (
        "half precision",
        mock.patch.object(triton_gemm, "_multiply", ends),
        lambda kind: kind.operator in product and kind.dtype == HALF,
    )
    yield (
        "no zero points of weights alone",
        mock.patch.object(triton_gemm, "dequantized_weight", unshifted),
        lambda kind: kind.operator == OPERATORS[2] and kind.weight_shifted,
    )


def first_tests(every: int) -> None:
    """Each kind of kernel passes the first test, and a mistake is seen in those that have it."""
    here = torch.device("cpu")
    for kind in KINDS[::every]:
        assert not first_test.differs(kind, here), kind
    each_block(here)
    for what, mistake, has in planted():
        with mistake:
            for kind in [kind for kind in KINDS if has(kind)][: 1 + (every == 1)]:
                assert first_test.differs(kind, here), (what, kind)
            assert not first_test.differs(KINDS[-1], here), what
    print(f"{len(KINDS[::every])} kinds of kernel are asked")


def each_block(here: torch.device) -> None:
    """Rows of a first test are of the block that it asks for, in memory as they are to be."""
    for kind in (each for each in KINDS if each.block != 256):
        maker = tiles.weight_block if kind.operator == "dequant_linear" else tiles.row_block
        length = first_test._length(kind)
        assert (maker(length), tiles.multiple(length)) == (kind.block, kind.length), kind
        room: Any = triton_quantize
        name = "row_block"
        if kind.operator == "dequant_linear":
            room, name = triton_gemm, "weight_block"
        with mock.patch.object(room, name, wraps=maker) as asked:
            assert not first_test.differs(kind, here), kind
        assert {call.args for call in asked.mock_calls} == {(length,)}, kind


TILES = tuple((rows, depth) for depth in (32, 64, 128) for rows in (16, 32, 64, 128))
PRODUCTS = ("int_linear", "grouped_int_linear", "int_product")


def product(operator: str, tile: tuple[int, int], seed: int) -> tuple[Any, ...]:
    """Operands of a call in the tile, not of the sizes that its first test has."""
    rows, depth = tile[0] - 1, tile[1] + 22
    if operator == "int_product":
        return Calls(seed, (2, rows), SINGLE).product(depth, 33)
    group = tile[1] if operator == "grouped_int_linear" else 0
    site = Calls(seed, (rows, depth), SINGLE).site(33, group, False)
    return (*site, group or 1024, False)


@contextlib.contextmanager
def mistake_in(tile: tuple[int, int], raised: bool) -> Iterator[None]:
    """Products in this tile do not run, or have another sign; all others are right."""
    sizes, last = triton_gemm._tiles, [(0, 0)]

    def noted(rows: int, length: int) -> dict[str, Any]:
        found = sizes(rows, length)
        last[0] = (found["BM"], found["BK"])
        if raised and last[0] == tile:
            raise OutOfResources(200_000, 100_000, "shared memory")
        return found

    def turned(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *operands: run(*operands) * (-1 if last[0] == tile else 1)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton_gemm, "_tiles", noted))
        for name in ("_multiply", "int_product"):
            run = getattr(triton_gemm, name)
            stack.enter_context(mock.patch.object(triton_gemm, name, turned(run)))
        yield


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """The table's rows of CUDA take calls here, and are asked before the first, as there."""
    rows = tuple(replace(row, device="cpu") for row in table.TABLE if row.device == "cuda")
    cuda._inexact.cache_clear()
    with (
        mock.patch.object(table, "TABLE", rows),
        mock.patch.object(cuda, "_without_device", return_value=""),
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
        mock.patch.object(torch.cuda, "get_device_name", return_value="this processor"),
    ):
        yield
    cuda._inexact.cache_clear()


def falls_back(kind: Kind, other: tuple[int, int], raised: bool) -> None:
    """Calls in the kind's tile, which is mistaken, after one warning; others are Triton's.

    Where the CPU's int8 product differs from int64 (AVX2 alone), a note of that is no reason here.
    """
    operator, tile = kind.operator, (kind.rows, kind.depth)
    called, composed = getattr(torch.ops.fxquant, operator), getattr(fused, operator)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for size, reasons in ((other, 0), (tile, 1), (tile, 1), (other, 1)):
            operands = product(operator, size, sum(tile))
            by_triton = table.implementation(operator, *operands) is not None
            assert by_triton == (size == other), (kind, size, raised)
            said = [str(each.message) for each in told if "_int_mm" not in str(each.message)]
            assert len(said) == reasons, (kind, size, raised)
            assert same(called(*operands), composed(*operands)), (kind, size, raised)
    reason = "OutOfResources: out of resource: shared memory" if raised else "other bits"
    assert reason in said[0], said[0]


def each_tile(every: int) -> None:
    """Each tile is asked for itself; where one alone is mistaken, its calls fall back."""
    here = torch.device("cpu")
    for at, (operator, tile) in enumerate((each, tile) for tile in TILES for each in PRODUCTS):
        if at % every:
            continue
        kind = Kind(operator, SINGLE, rows=tile[0], depth=tile[1])
        with mock.patch.object(triton_gemm, "_tiles", wraps=triton_gemm._tiles) as asked:
            assert not first_test.differs(kind, here), kind
        assert {tiles.tile(*call.args) for call in asked.mock_calls} == {tile}, kind
        other = TILES[(TILES.index(tile) + 5) % len(TILES)]  # of other rows and another depth
        for raised in (False, True):
            with as_on_cuda(), mistake_in(tile, raised):
                falls_back(kind, other, raised)
    print(f"{len(TILES) * len(PRODUCTS)} tiles of a product, each {every}th is asked for itself")


def agree(first: int, last: int) -> None:
    count = 0
    for seed in range(first, last):
        for dtype in DTYPES:
            for name, found, wanted in calls(seed, dtype):
                assert same(found, wanted), (name, seed, dtype)
                count += 1
    print(f"{count} calls agree")


def compiled(capabilities: list[int]) -> None:
    """No product and sum in one rounding, IEEE quotients, int8 tensor cores."""
    for capability in capabilities:
        for name, kernel, constants in kernels():
            pointers = {"x": "*bf16", "w": "*i8", "codes": "*i8", "y": "*bf16", "out": "*fp16"}
            whole = ("M", "N", "K", "length", "groups", "group_size")
            signature = {}
            for each in kernel.arg_names:
                kind = "i32" if each in whole or each.endswith("_stride") else "*fp32"
                kind = "*i32" if each in ("zero", "w_sum", "shift", "zero_points") else kind
                signature[each] = pointers.get(each, kind) if each not in constants else "constexpr"
            if name == "grouped_kernel":
                signature["x"] = "*i8"
            if name in ("linear_kernel", "product_kernel"):
                signature["x"] = "*i8"
            source = ASTSource(kernel, signature=signature, constexprs=constants)
            target = GPUTarget("cuda", capability, 32)
            found = triton.compile(source, target=target, options={"enable_fp_fusion": False})
            text = found.asm["ptx"]
            assert not re.search(r"\bfma\.rn\.f32|mad\.f32", text), (name, capability)
            if name in ("token_kernel", "static_kernel"):
                assert "div.rn.f32" in text, (name, capability)
                assert "div.full" not in text
            if name in ("linear_kernel", "grouped_kernel", "product_kernel"):
                assert re.search(r"mma.*s32.*s8|wgmma.*s32.s8", text), (name, capability)
            print(f"sm_{capability} {name}")


def kernels() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each kernel with its constants."""
    ends = {"QMIN": -128, "QMAX": 127, "BLOCK": 256}
    yield "token_kernel", triton_quantize.token_kernel, {**ends, "SYMMETRIC": False}
    yield "ends_kernel", triton_quantize.ends_kernel, {"BLOCK": 256}
    static = {**ends, "AFFINE": True, "FIND_NAN": True}
    yield "static_kernel", triton_quantize.static_kernel, static
    flags = {"HAS_ZERO": True, "HAS_SHIFT": True, "HAS_BIAS": True}
    tiles = {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}
    yield "linear_kernel", triton_gemm.linear_kernel, {**flags, **tiles, "PACKED": False}
    yield "grouped_kernel", triton_gemm.grouped_kernel, {**flags, **tiles, "PACKED": True}
    for turned in (False, True):
        yield "product_kernel", triton_gemm.product_kernel, {**tiles, "TURNED": turned}
    weight = {"HAS_SHIFT": True, "PACKED": True, "BLOCK": 256}
    yield "weight_kernel", triton_gemm.weight_kernel, weight


if __name__ == "__main__":
    what, numbers = sys.argv[1], [int(each) for each in sys.argv[2:]]
    if what == "agree":
        agree(numbers[0], numbers[1])
    elif what == "first":
        first_tests(numbers[0])
    elif what == "tiles":
        each_tile(numbers[0])
    else:
        compiled(numbers)
