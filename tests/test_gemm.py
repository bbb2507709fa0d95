"""The integer GEMM is exact: bit for bit against int64, on codes chosen to break it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.numerics.gemm import (
    CHUNK,
    EXACT_LIMIT,
    MAX_LENGTH,
    certified_chunk,
    cuda_int_gemm,
    exact_dtype,
    float_int_gemm,
    int_mm_supported,
    reference_int_gemm,
)

LENGTHS = (1, 7, 1023, 1024, 1025, 2048, 4099, 16384)
PATTERNS = ("largest", "smallest", "alternating", "random")


def codes(pattern: str, rows: int, length: int) -> Tensor:
    if pattern == "random":
        return torch.randint(-128, 128, (rows, length), dtype=torch.int8)
    row = {"largest": [127, 127], "smallest": [-128, -128], "alternating": [127, -128]}[pattern]
    return torch.tensor(row, dtype=torch.int8).repeat(rows, length)[:, :length].contiguous()


def exact(x: Tensor, w: Tensor) -> Tensor:
    return reference_int_gemm(x, w).to(torch.int32)


def test_the_reference_against_numpy_einsum() -> None:
    x, w = codes("random", 3, 50).reshape(3, 1, 50), codes("random", 4, 50)
    wanted = np.einsum("abk,nk->abn", x.numpy().astype(np.int64), w.numpy().astype(np.int64))
    assert reference_int_gemm(x, w).dtype == torch.int64
    np.testing.assert_array_equal(reference_int_gemm(x, w).numpy(), wanted)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("x_pattern", PATTERNS)
@pytest.mark.parametrize("w_pattern", PATTERNS)
def test_chunked_gemm_is_exact(length: int, x_pattern: str, w_pattern: str) -> None:
    x, w = codes(x_pattern, 5, length), codes(w_pattern, 6, length)
    result = float_int_gemm(x, w, CHUNK)
    assert result.dtype == torch.int32
    assert torch.equal(result, exact(x, w))


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 4),
    columns=st.integers(1, 5),
    length=st.integers(1, 3000),
    chunk=st.sampled_from([1, 100, 1000, CHUNK]),
)
@settings(deadline=None, max_examples=60)
def test_any_shape_and_chunk(seed: int, rows: int, columns: int, length: int, chunk: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (rows, length), dtype=torch.int8, generator=g)
    w = torch.randint(-128, 128, (columns, length), dtype=torch.int8, generator=g)
    assert torch.equal(float_int_gemm(x, w, chunk), exact(x, w))


@pytest.mark.parametrize("length", [64, 2500])
def test_operands_that_are_not_contiguous(length: int) -> None:
    x = codes("random", length, 9).t()
    w = codes("random", 7, 2 * length)[:, ::2]
    assert not x.is_contiguous()
    assert not w.is_contiguous()
    assert torch.equal(float_int_gemm(x, w, CHUNK), exact(x, w))
    assert torch.equal(cuda_int_gemm(x, w, CHUNK), exact(x, w))


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("length", [64, 3000])
def test_empty_batch_and_one_row(rows: int, length: int) -> None:
    x, w = codes("random", rows, length), codes("random", 5, length)
    result = float_int_gemm(x, w, CHUNK)
    assert result.shape == (rows, 5)
    assert torch.equal(result, exact(x, w))


def test_one_gemm_without_a_certificate_is_wrong() -> None:
    # Why chunks exist: the sum is odd and above 2**24, so no float32 holds it, in any order.
    length = 1041
    x, w = codes("largest", 2, length), codes("largest", 3, length)
    assert 127 * 127 * length > EXACT_LIMIT
    assert certified_chunk(w, 127) == CHUNK
    assert not torch.equal(float_int_gemm(x, w, 0), exact(x, w))
    assert torch.equal(float_int_gemm(x, w, CHUNK), exact(x, w))


def test_the_certificate_at_its_limit() -> None:
    row = torch.full((1, 1024), -128, dtype=torch.int8)
    assert int(row.int().abs().sum()) * 128 == EXACT_LIMIT
    assert certified_chunk(row, 128) == CHUNK
    assert certified_chunk(row[:, 1:], 128) == 0
    row[0, 500] = -127
    assert certified_chunk(row, 128) == 0
    # The largest row decides, wherever it stands.
    others = torch.zeros(3, 1024, dtype=torch.int8)
    row[0, 500] = -128
    assert certified_chunk(torch.cat((others, row, others)), 128) == CHUNK
    assert certified_chunk(torch.cat((others, row, others)), 127) == 0


def test_the_certificate_takes_magnitudes() -> None:
    # A sum with signs would be 0 here, and abs() of an int8 -128 is -128 again.
    assert certified_chunk(codes("alternating", 2, 16384), 127) == CHUNK
    assert certified_chunk(codes("smallest", 1, 16384), 127) == CHUNK
    assert certified_chunk(torch.empty(0, 16, dtype=torch.int8), 127) == 0


@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(900, 5000),
    size=st.integers(1, 128),
    max_code=st.sampled_from([1, 7, 127, 128]),
)
@settings(deadline=None, max_examples=80)
def test_a_certificate_is_sound(seed: int, length: int, size: int, max_code: int) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randint(-size, min(size, 127) + 1, (4, length), dtype=torch.int8, generator=g)
    worst = int(w.to(torch.int64).abs().sum(1).max()) * max_code
    assert certified_chunk(w, max_code) == (0 if worst < 2**24 else CHUNK)
    # The worst inputs: each code as large as allowed and of the weight's sign.
    x = torch.where(w < 0, -max_code, min(max_code, 127)).to(torch.int8)
    x = torch.cat((x, -x.clamp(min=-127)))
    chunk = certified_chunk(w, max_code)
    assert torch.equal(float_int_gemm(x, w, chunk), exact(x, w))


def test_a_certified_row_one_below_the_limit_is_exact() -> None:
    # sum |w_q| = 131071, and 131071 * 128 = 2**24 - 128: the largest multiple that is certified.
    w = torch.full((1, 1024), -128, dtype=torch.int8)
    w[0, 0] = -127
    x = torch.full((1, 1024), -128, dtype=torch.int8)
    assert certified_chunk(w, 128) == 0
    assert int(float_int_gemm(x, w, 0)) == 2**24 - 128


@pytest.mark.parametrize("chunk", [0, CHUNK])
def test_exact_under_autocast(chunk: int) -> None:
    x, w = codes("random", 8, 1500), codes("random", 6, 1500)
    x, w = (x // 2, w // 2) if chunk == 0 else (x, w)
    assert certified_chunk(w, 128) == 0 or chunk
    with torch.autocast("cpu", torch.bfloat16):
        result = float_int_gemm(x, w, chunk)
        plain = (x.float() @ w.float().t()).float()
    assert torch.equal(result, exact(x, w))
    # The control: autocast does reach a GEMM that is not shielded, and rounds it.
    assert not torch.equal(plain, exact(x, w).float())


def test_autocast_is_on_again_afterwards() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        float_int_gemm(codes("random", 2, 8), codes("random", 2, 8), 0)
        assert torch.is_autocast_enabled("cpu")


def test_the_longest_row_fits_int32() -> None:
    assert 255 * 255 * MAX_LENGTH < 2**31 <= 255 * 255 * (MAX_LENGTH + 1)


@pytest.mark.parametrize(
    ("rows", "length", "columns", "supported"),
    [
        (17, 8, 8, True),
        (512, 4096, 11008, True),
        (16, 64, 64, False),
        (1, 64, 64, False),
        (0, 64, 64, False),
        (32, 0, 64, False),
        (32, 64, 0, False),
        (32, 12, 64, False),
        (32, 64, 12, False),
        (33, 64, 64, True),
    ],
)
def test_int_mm_supported(rows: int, length: int, columns: int, supported: bool) -> None:
    assert int_mm_supported(rows, length, columns) is supported


def test_cuda_route_takes_int_mm_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Tensor, Tensor]] = []

    def spy(x: Tensor, w: Tensor) -> Tensor:
        called.append((x, w))
        # The CPU's own _int_mm saturates sums of two products where the CPU has no VNNI.
        return (x.long() @ w.long()).int()

    monkeypatch.setattr(torch, "_int_mm", spy)
    x, w = codes("random", 48, 17).t(), codes("random", 16, 48)
    assert torch.equal(cuda_int_gemm(x, w, CHUNK), exact(x, w))
    assert called[0][0].is_contiguous()
    x = codes("random", 16, 48)
    assert torch.equal(cuda_int_gemm(x, w, CHUNK), exact(x, w))
    assert len(called) == 1


PRECISIONS = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}


@pytest.mark.parametrize(
    ("device", "precision"), [("cuda", "tf32"), ("cpu", "bf16"), ("cpu", "tf32")]
)
def test_float64_where_fp32_would_be_less(device: str, precision: str) -> None:
    matmul: Any = PRECISIONS[device].matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = precision
        assert exact_dtype(device) is torch.float64
        x, w = codes("random", 20, 2000), codes("random", 5, 2000)
        assert torch.equal(float_int_gemm(x, w, CHUNK), exact(x, w))
        matmul.fp32_precision = "ieee"
        assert exact_dtype(device) is torch.float32
    finally:
        matmul.fp32_precision = before


def test_float64_under_autocast() -> None:
    assert exact_dtype("cpu") is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert exact_dtype("cpu") is torch.float64
    assert exact_dtype("cpu") is torch.float32
