"""Tiles of a product of codes: what Triton compiles apart, known without Triton."""

from __future__ import annotations


def tile(rows: int, length: int) -> tuple[int, int]:
    """Rows of a program, and codes of K in each of its steps, in a product of ``rows`` rows.

    ``length``: of K, or of a group of K. int8 dot products take 16 rows and 32 codes at least.
    """
    tall = 128 if rows > 64 else 64 if rows > 32 else 32 if rows > 16 else 16
    return tall, 128 if length >= 128 else 64 if length >= 64 else 32
