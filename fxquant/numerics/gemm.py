"""Exact integer GEMM: int8 codes in, int32 sums out, on every device.

An fp32 sum of integers is exact while every partial sum stays within 2**24. A product of two
int8 codes is at most 128 * 128 = 2**14, so 1024 of them always fit: K is cut into chunks of 1024
whose fp32 products are summed in int32. Where the weights' row sums prove that the whole row fits
(`certified_chunk`), one fp32 GEMM is exact. Where the processor multiplies int8 itself, cpu_int8
has the route that is taken instead, to the same sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EXACT_LIMIT = 2**24
CHUNK = 1024
# sum of (x_q - z_x)(w_q - z_w) is at most 255 * 255 * K and must fit int32.
MAX_LENGTH = (2**31 - 1) // (255 * 255)


def certified_chunk(weight_codes: Tensor, max_code: int) -> int:
    """0 if one fp32 GEMM is exact for every input with ``|x_q| <= max_code``, else CHUNK.

    ``weight_codes`` int8 [N, K]. Bounds every partial sum by max over rows of sum_k |w_q| times
    max_code, which must stay below 2**24.
    """
    if weight_codes.numel() == 0 or 128 * weight_codes.shape[-1] * max_code < EXACT_LIMIT:
        return 0
    largest_row = int(weight_codes.to(torch.int32).abs_().sum(dim=-1).max())
    return 0 if largest_row * max_code < EXACT_LIMIT else CHUNK


def reference_int_gemm(x_codes: Tensor, weight_codes: Tensor) -> Tensor:
    """int64 product ``x_q @ w_q.T``, obviously right and slow: [..., K] by [N, K] to [..., N].

    What a processor's own kernel is asked against before it is trusted.
    """
    return x_codes.to(torch.int64) @ weight_codes.to(torch.int64).t()


def exact_dtype(device: str) -> torch.dtype:
    """float32, or float64 where autocast, TF32 or bf16 would make an fp32 GEMM something less.

    float64 is slower but exempt from all of them, and no global switch has to be thrown.
    """
    reduced = reduced_precision(device) or torch.is_autocast_enabled(device)
    return torch.float64 if reduced else torch.float32


def reduced_precision(device: str) -> bool:
    """Whether the user's settings let an fp32 GEMM round its operands to TF32 or bf16."""
    backend: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision not in ("none", "ieee")


def float_int_gemm(x_codes: Tensor, weight_codes: Tensor, chunk: int) -> Tensor:
    """The same through float GEMMs of at most ``chunk`` columns (0: all at once); int32 [M, N].

    ``x_codes`` is [M, K]. Exact if chunk is 0 and certified, or at most CHUNK.
    """
    dtype = exact_dtype(x_codes.device.type)
    if not chunk or weight_codes.shape[-1] <= chunk:
        return _float_product(x_codes, weight_codes, dtype)
    xs, ws = x_codes.split(chunk, 1), weight_codes.split(chunk, 1)
    parts = (_float_product(x, w, dtype) for x, w in zip(xs, ws, strict=True))
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def _float_product(x_codes: Tensor, weight_codes: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mm(x_codes.to(dtype), weight_codes.to(dtype).t()).to(torch.int32)


def int_mm_supported(rows: int, length: int, columns: int) -> bool:
    """Whether ``torch._int_mm`` on CUDA takes [rows, length] by [length, columns].

    cuBLASLt wants more than 16 rows and multiples of 8 elsewhere. The fake kernel accepts
    other shapes too, so this predicate is the only guard.
    """
    return rows > 16 and length > 0 and columns > 0 and length % 8 == 0 and columns % 8 == 0


def cuda_int_gemm(x_codes: Tensor, weight_codes: Tensor, chunk: int) -> Tensor:
    """int8 tensor cores through ``torch._int_mm`` within its limits, else float_int_gemm."""
    if int_mm_supported(x_codes.shape[0], x_codes.shape[1], weight_codes.shape[0]):
        return torch._int_mm(x_codes.contiguous(), weight_codes.contiguous().t())
    return float_int_gemm(x_codes, weight_codes, chunk)


def batched_int_matmul(left_codes: Tensor, right_codes: Tensor) -> Tensor:
    """int32 [..., M, N], exact, of int8 codes [..., M, K] and [..., K, N]: chunks as above."""
    dtype = exact_dtype(left_codes.device.type)
    lefts, rights = left_codes.split(CHUNK, -1), right_codes.split(CHUNK, -2)
    parts = (
        torch.matmul(left.to(dtype), right.to(dtype)).to(torch.int32)
        for left, right in zip(lefts, rights, strict=True)
    )
    total = next(parts)
    for part in parts:
        total = total + part
    return total
