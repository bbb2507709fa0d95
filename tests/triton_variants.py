"""What Triton compiles for a call, against what its first test has compiled, in its own process.

TRITON_INTERPRET=1 python -m tests.triton_variants FIRST LAST       calls of these seeds
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.interpreter import InterpretedFunction

from fxquant.numerics.kernels import cuda, first_test, table
from fxquant.numerics.kernels.first_test import Kind
from tests.fused_calls import DTYPES, GRAINS, Calls

Variant = tuple[Any, ...]


@contextlib.contextmanager
def launched() -> Iterator[list[Variant]]:
    """What Triton would compile for each launch, in its own words; nothing is run."""
    found: list[Variant] = []

    def run(self: Any, *operands: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        named = dict(zip(self.arg_names, operands, strict=False)) | constants
        given = {name: named.pop(name) for name in self.arg_names}
        fixed = {name for name, kind in self.fn.__annotations__.items() if "constexpr" in str(kind)}
        plain = self.kwargs["do_not_specialize"] or ()
        asked = (
            value
            if name in fixed
            else native_specialize_impl(CUDABackend, value, False, name not in plain, True)
            for name, value in given.items()
        )
        found.append((self.__name__, *asked, *sorted(named.items())))

    with mock.patch.object(InterpretedFunction, "run", run):
        yield found


def variants(first: int, last: int) -> None:
    """What a call compiles, its first test has compiled before."""
    here, count = torch.device("cpu"), 0
    kinds: list[Kind] = []
    seen: set[Variant] = set()

    def without(x: Tensor, kind: Kind) -> str:
        kinds.append(kind)
        return ""

    for seed in range(first, last):
        for operator, operands in varied(seed):
            row = next(r for r in table.TABLE if (r.operator, r.device) == (operator, "cuda"))
            with mock.patch.object(cuda, "_without", without):
                reason = row.why_not(*operands)
            if reason:
                continue
            with launched() as tested:
                first_test.differs(kinds[-1], here)
            anywhere = mock.patch.object(torch.cuda, "device_of", contextlib.nullcontext)
            with anywhere, launched() as compiled:
                row.run(*operands)
            assert compiled, (operator, kinds[-1])
            assert set(compiled) <= set(tested), (kinds[-1], compiled, tested)
            count, seen = count + 1, seen | set(compiled)
    print(f"{count} calls compile nothing new: {len(seen)} variants")


SIZES = (1, 2, 3, 15, 16, 17, 32, 33, 48, 64, 65, 80, 128, 129, 192, 1024, 1040)


def varied(seed: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Calls of each operator, of sizes that Triton compiles apart, some within a larger tensor."""
    generator = torch.Generator().manual_seed(seed)

    def one(choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    rows, length, columns, group = one(SIZES), one(SIZES), one(SIZES[:-3]), one(SIZES[:-2])
    lead = one(((rows,), (2, rows), (rows, 1)))
    dtype, packed = one(DTYPES), one((False, True))
    made = Calls(seed, (*lead, length), dtype)

    def moved(operands: tuple[Any, ...]) -> tuple[Any, ...]:
        """Each tensor begins at an odd place of another now and then."""
        return tuple(
            torch.cat([each.flatten()[:1], each.flatten()])[1:].view(each.shape)
            if isinstance(each, Tensor) and each.numel() and one((False, True))
            else each
            for each in operands
        )

    x = made.input()
    for symmetric in (True, False):
        yield "quantize_rows", (*moved((x,)), one(GRAINS), symmetric, -127, 127)
        shift = None if symmetric else torch.tensor(5, dtype=torch.int32)
        yield "quantize_static", (*moved((x, torch.tensor(0.5), shift)), -128, 127)
    site = made.site(columns, 0, packed)
    yield "int_linear", (*moved(site), one((0, 1024)), packed)
    grouped = made.site(columns, group, packed)
    if grouped[7] is not None and one((False, True)):
        grouped = (*grouped[:7], grouped[7].float(), grouped[8])
    yield "grouped_int_linear", (*moved(grouped), group, packed)
    *weight, size, is_packed = made.weight_only(columns, one((0, group)), packed)
    yield "dequant_linear", (*moved(tuple(weight)), size, is_packed)
    left, right, *others = Calls(seed, (*one(((), (2,), (2, 3))), rows), dtype).product(
        length, columns
    )
    yield "int_product", (*moved((left,)), right, *moved(tuple(others)))


if __name__ == "__main__":
    variants(int(sys.argv[1]), int(sys.argv[2]))
