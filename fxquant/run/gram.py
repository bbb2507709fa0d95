"""Second moments of a layer's input: the sum of x x^T over its calibration inputs.

Of whole rows it is the Hessian of the layer's squared output error (GPTQ, QuantEase); of a group of
columns it weighs the errors of that group (AWQ's clipping).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.errors import CalibrationError, NonFiniteError
from fxquant.numerics.observers import attended
from fxquant.numerics.quantization import split_groups

# Strips of the upper triangle: wide enough for a fast product, and nearly half of it is saved.
_STRIP = 128


class Gram:
    """``sum x x^T`` over the attended rows x of the values of ``source``, for each group of
    ``group_size`` columns: float32 [G, g, g], the last group filled with zeros; None: one group.

    ``site`` is who reads it first; errors name it.
    """

    def __init__(self, source: Node, site: str, group_size: int | None = None) -> None:
        self.source = source
        self.site = site
        self.tokens = 0
        self._group_size = group_size
        self._upper: Tensor | None = None

    def __call__(self, node: Node, value: Any, mask: Tensor) -> Any:
        """An OnValue of SequentialRun."""
        if node is self.source:
            self.add(attended(value, mask))
        return value

    def add(self, rows: Tensor) -> None:
        """Add ``rows`` float [tokens, K]."""
        grouped = split_groups(rows.to(torch.float32), self._group_size).unbind(1)
        length = grouped[0].shape[1]
        if self._upper is None:
            self._upper = rows.new_zeros(len(grouped), length, length, dtype=torch.float32)
        for upper, part in zip(self._upper, grouped, strict=True):
            for start in range(0, length, _STRIP):
                end = min(start + _STRIP, length)
                upper[start:end, start:].addmm_(part[:, start:end].t(), part[:, start:])
        self.tokens += len(rows)

    def sums(self) -> Tensor:
        """Symmetric, float32 [G, g, g]; CalibrationError or NonFiniteError naming the site."""
        if self._upper is None or not self.tokens:
            raise CalibrationError(f"{self.site}: calibration saw no token here")
        if not bool(torch.isfinite(self._upper.diagonal(dim1=1, dim2=2)).all()):
            raise NonFiniteError(
                f"{self.site}: its input holds NaN or infinite activations during calibration; "
                "the model overflows its dtype or its weights are damaged"
            )
        full: Tensor = self._upper.triu() + self._upper.triu(1).transpose(1, 2)
        return full

    def mean(self) -> Tensor:
        """The Hessian, float32 [K, K], of ungrouped rows; also refuses inputs that are all 0."""
        full = self.sums()[0]
        if not bool(full.diagonal().any()):
            raise CalibrationError(f"{self.site}: all its calibration inputs are 0")
        mean: Tensor = full / self.tokens
        return mean
