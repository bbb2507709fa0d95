"""What Triton compiles apart, known without Triton: sizes, and where in memory a tensor begins."""

from __future__ import annotations

from torch import Tensor


def tile(rows: int, length: int) -> tuple[int, int]:
    """Rows of a program, and codes of K in each of its steps, in a product of ``rows`` rows.

    ``length``: of K, or of a group of K. int8 dot products take 16 rows and 32 codes at least.
    """
    tall = 128 if rows > 64 else 64 if rows > 32 else 32 if rows > 16 else 16
    return tall, 128 if length >= 128 else 64 if length >= 64 else 32


def row_block(length: int) -> int:
    """Numbers of a row that a quantizer has at once; its warps follow from it."""
    return min(4096, _power(length))


def weight_block(length: int) -> int:
    """Codes of a weight's row that one program makes numbers of."""
    return min(1024, _power(length))


def multiple(size: int) -> int:
    """What Triton compiles a size as: 1, a constant; 16, where it is a multiple of that, so that
    rows begin at whole vectors; or 0, any other."""
    return 1 if size == 1 else 16 if size % 16 == 0 else 0


def laid_out(values: Tensor) -> Tensor:
    """In one piece from a multiple of 16 bytes on, which Triton compiles for: itself or a copy."""
    whole = values.contiguous()
    return whole.clone() if whole.data_ptr() % 16 else whole


def turned(matrices: Tensor) -> bool:
    """Whether [..., K, N] lies in memory as [..., N, K], and not as it is."""
    return matrices.mT.is_contiguous() and not matrices.is_contiguous()


def _power(length: int) -> int:
    """The power of two that holds it, of 128 or more."""
    return max(128, 1 << (length - 1).bit_length())
