"""Fast implementations of the fused operators, in a table by operator and device.

The fused operators of ``fxquant.ir.fused`` ask the table; each row has a checker that says why it
does not take a call, and what no row takes runs as the composition of the plain operators. A row
gives the very bits of that composition, codes, int32 sums and outputs, except where it says
``exact=False``: those stand at level kernels-inexact alone. Knows numerics and torch,
no graph. Triton is imported where a CUDA tensor asks for it, and may be missing.
"""
