"""Scales, codes, exact integer GEMM, observers and ranges, codes of a weight.

Tensors in, tensors out: anyone above schemes may call this room, and it knows no graph.
"""
