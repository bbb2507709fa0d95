"""The CPU's int8 route: exact where it is taken, refused where it is not, the same graphs."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxquant
from fxquant.numerics import cpu_int8
from fxquant.numerics.gemm import reference_int_gemm
from tests.architectures import llama
from tests.processes import finished

HAS_ROUTE = cpu_int8.exact_int_mm()
needs_route = pytest.mark.skipif(not HAS_ROUTE, reason="this processor has no exact int8 GEMM")


@pytest.fixture
def asked_again() -> Iterator[None]:
    """The processor's answer is forgotten before and after."""
    cpu_int8._tested.cache_clear()
    yield
    cpu_int8._tested.cache_clear()


def codes(generator: torch.Generator, *shape: int) -> Tensor:
    """Half of them at the ends of int8, where sums of two products overflow 16 bits."""
    mixed = torch.randint(-128, 128, shape, generator=generator)
    ends = torch.randint(0, 2, shape, generator=generator) * 255 - 128
    return torch.where(torch.rand(shape, generator=generator) < 0.5, mixed, ends).to(torch.int8)


SIZES = {"rows": st.integers(0, 70), "length": st.integers(0, 1200), "columns": st.integers(1, 70)}


@needs_route
@given(seed=st.integers(0, 2**32 - 1), **SIZES)
@settings(deadline=None, max_examples=150)
def test_every_sum_is_that_of_int64(seed: int, rows: int, length: int, columns: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, w = codes(g, rows, length), codes(g, columns, length)
    found = cpu_int8.int_mm(x, w)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), reference_int_gemm(x, w))


@needs_route
def test_every_small_shape() -> None:
    g = torch.Generator().manual_seed(3)
    for rows, length, columns in itertools.product((0, 1, 2, 3, 17), range(6), (1, 2, 3, 17)):
        x, w = codes(g, rows, length), codes(g, columns, length)
        wanted = reference_int_gemm(x, w)
        assert torch.equal(cpu_int8.int_mm(x, w).long(), wanted), (rows, length, columns)
        found = torch.ops.fxquant.int_matmul_cpu(x[None], w.t()[None])
        assert torch.equal(found[0].long(), wanted), (rows, length, columns)


@needs_route
def test_every_layout_of_a_matrix() -> None:
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))

    def layouts(rows: int, columns: int) -> dict[str, Tensor]:
        made = codes(generator, rows, columns)
        wide = codes(generator, 2 * rows, 2 * columns)
        return {
            "rows": made,
            "columns": made.t().contiguous().t(),
            "one row": made[:1].expand(rows, columns),
            "one column": made[:, :1].expand(rows, columns),
            "one number": made[0, 0].expand(rows, columns),
            "every second row": wide[::2, :columns],
            "every second column": wide[:rows, ::2],
            "every second of both": wide[::2, ::2],
            "every second column, across": wide.t().contiguous().t()[:rows, ::2],
        }

    for rows, length, columns in ((16, 32, 16), (2, 32, 64), (33, 70, 5), (1, 8, 9)):
        for (one, x), (other, weight) in itertools.product(
            layouts(rows, length).items(), layouts(columns, length).items()
        ):
            expected = reference_int_gemm(x, weight).to(torch.int32)
            assert torch.equal(cpu_int8.int_mm(x, weight), expected), (one, other)
            assert torch.equal(cpu_int8.batched_int_mm(x, weight.t()), expected), (one, other)


@needs_route
def test_operands_that_are_views() -> None:
    g = torch.Generator().manual_seed(5)
    x, w = codes(g, 40, 300), codes(g, 30, 300)
    for xs, ws in zip(x.split(128, 1), w.split(128, 1), strict=True):
        assert torch.equal(cpu_int8.int_mm(xs, ws).long(), reference_int_gemm(xs, ws))
    wide, odd = codes(g, 300, 40).t(), w[::2]
    assert torch.equal(cpu_int8.int_mm(wide, odd).long(), reference_int_gemm(wide, odd))


@needs_route
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.lists(st.integers(1, 3), max_size=2),
    shared=st.booleans(),
    transposed=st.booleans(),
    **SIZES,
)
@settings(deadline=None, max_examples=60)
def test_batches_of_products(
    seed: int,
    batch: list[int],
    shared: bool,
    transposed: bool,
    rows: int,
    length: int,
    columns: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    left = codes(g, *batch, rows, length)
    right = codes(g, *([1] * len(batch) if shared else batch), length, columns)
    if transposed:
        right = right.mT.contiguous().mT
    found: Tensor = torch.ops.fxquant.int_matmul_cpu(left, right)
    wanted = left.long() @ right.long()
    assert found.dtype == torch.int32
    assert found.shape == wanted.shape
    assert torch.equal(found.long(), wanted)


def saturating(x: Tensor, w: Tensor) -> Tensor:
    """As instructions for int8 without VNNI sum: products in pairs, kept within 16 bits."""
    products = x.long()[:, :, None] * w.long()[None]
    pairs = torch.nn.functional.pad(products, (0, 0, 0, products.shape[1] % 2)).unflatten(
        1, (-1, 2)
    )
    kept: Tensor = pairs.sum(2).clamp(-(2**15), 2**15 - 1)
    return kept.sum(1).to(torch.int32)


def test_a_kernel_that_saturates_is_not_taken(
    asked_again: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", saturating)
    with pytest.warns(RuntimeWarning, match="differs from int64"):
        assert not cpu_int8.exact_int_mm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cpu_int8.exact_int_mm(), "asked and said once a process"


def test_a_kernel_that_is_exact_is_taken(
    asked_again: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exact(x: Tensor, w: Tensor) -> Tensor:
        return reference_int_gemm(x, w.t()).to(torch.int32)

    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", exact)
    assert cpu_int8.exact_int_mm()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not cpu_int8.exact_int_mm()


def test_without_the_instructions_nothing_is_tried(
    asked_again: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_vnni_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    assert not cpu_int8.exact_int_mm()


@needs_route
@pytest.mark.parametrize(
    "scheme",
    [
        "w8a8-dynamic-token",
        "w8a8-static-asym:absmax",
        "w4-g32-asym/a8-dynamic-token",
        "w8a8-dynamic+attn8",
    ],
)
def test_a_graph_is_the_same_bit_for_bit(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    ids = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(1))
    quantized = fxquant.convert(model, scheme, calibration=[ids] if "static" in scheme else None)
    fast = quantized(input_ids=ids)
    monkeypatch.setattr(cpu_int8, "exact_int_mm", lambda: False)
    assert torch.equal(fast, quantized(input_ids=ids))


COMPILED_FIRST = """
import torch
import fxquant
from fxquant.numerics import cpu_int8
assert cpu_int8._tested.cache_info().misses == 0
x = torch.randint(-128, 128, (2, 3, 40, 33), dtype=torch.int8)
y = torch.randint(-128, 128, (2, 3, 33, 20), dtype=torch.int8)
w = torch.randint(-128, 128, (24, 33), dtype=torch.int8)
def both(x, y, w):
    ops = torch.ops.fxquant
    return ops.int_gemm(x, w, 0), ops.int_matmul(x, y)
compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
for n in (40, 7):
    gemm, product = compiled(x[:, :, :n], y, w)
    assert torch.equal(gemm.long(), x[:, :, :n].long() @ w.long().t())
    assert torch.equal(product.long(), x[:, :, :n].long() @ y.long())
assert cpu_int8._tested.cache_info().misses == 1
print(cpu_int8.exact_int_mm())
"""


def test_the_first_question_may_come_from_a_compiler() -> None:
    """The answer is the one that was given here, outside of it, whatever the processor's is."""
    done = finished([sys.executable, "-c", COMPILED_FIRST])
    assert done.stdout.split() == [str(HAS_ROUTE)], done.stderr
