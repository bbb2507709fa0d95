"""The Hessian of a layer's squared output error: the sum of x x^T over its calibration inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.errors import CalibrationError, NonFiniteError
from fxquant.observers import attended

# Strips of the upper triangle: wide enough for a fast product, and nearly half of it is saved.
_STRIP = 128


class Hessian:
    """``sum x x^T`` float32 [K, K] over the attended rows x of the values of ``source``.

    ``site`` is who reads it first; errors name it.
    """

    def __init__(self, source: Node, site: str) -> None:
        self.source = source
        self.site = site
        self.tokens = 0
        self._upper: Tensor | None = None

    def __call__(self, node: Node, value: Any, mask: Tensor) -> Any:
        """An OnValue of SequentialRun."""
        if node is self.source:
            self.add(attended(value, mask))
        return value

    def add(self, rows: Tensor) -> None:
        """Add ``rows`` float [tokens, K]."""
        rows = rows.to(torch.float32)
        length = rows.shape[1]
        if self._upper is None:
            self._upper = rows.new_zeros(length, length)
        for start in range(0, length, _STRIP):
            end = min(start + _STRIP, length)
            self._upper[start:end, start:].addmm_(rows[:, start:end].t(), rows[:, start:])
        self.tokens += len(rows)

    def mean(self) -> Tensor:
        """The symmetric mean; raises CalibrationError or NonFiniteError naming the site."""
        if self._upper is None or not self.tokens:
            raise CalibrationError(f"{self.site}: calibration saw no token here")
        diagonal = self._upper.diagonal()
        if not bool(torch.isfinite(diagonal).all()):
            raise NonFiniteError(
                f"{self.site}: its input holds NaN or infinite activations during calibration; "
                "the model overflows its dtype or its weights are damaged"
            )
        if not bool(diagonal.any()):
            raise CalibrationError(f"{self.site}: all its calibration inputs are 0")
        full = self._upper.triu() + self._upper.triu(1).t()
        return full / self.tokens
