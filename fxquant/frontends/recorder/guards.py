"""What a model decided by the sizes of its input while it was recorded: refused, or harmless."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxquant.errors import TracingError


class Guards:
    """A recorded graph has taken one side of each such decision; it must be the side of all inputs.

    Harmless are a longest length, which ``longest`` then is, and that a size is not some number (1
    mostly, which broadcasting asks; the model is compared with a batch and a length of 1).
    """

    def __init__(self, env: ShapeEnv, input_ids: Tensor) -> None:
        self._env = env
        length = input_ids.shape[1]
        assert isinstance(length, torch.SymInt)
        self._length: sympy.Symbol = length.node.expr
        self._seen: int = 0
        self.longest: int | None = None

    def check(self) -> None:
        """Raise TracingError for a new decision that some inputs would take otherwise."""
        guards = self._env.guards[self._seen :]
        self._seen = len(self._env.guards)
        for condition in (guard.expr for guard in guards):
            if isinstance(condition, sympy.Ne):
                continue
            longest = self._most(condition)
            if longest is None:
                raise TracingError(
                    f"it decides by the size of its input (whether {self._words(condition)}), and "
                    "a graph holds one way only"
                )
            self.longest = longest if self.longest is None else min(self.longest, longest)

    def _most(self, condition: Any) -> int | None:
        """The largest length for which ``condition`` holds, if it holds for all below."""
        if not isinstance(condition, sympy.Rel) or condition.free_symbols != {self._length}:
            return None
        slack = condition.gts - condition.lts  # at least 0, or above it
        line = sympy.Poly(slack, self._length) if slack.is_polynomial(self._length) else None
        if line is None or line.degree() != 1 or not line.LC() < 0:
            return None
        root = -line.TC() / line.LC()
        strict = isinstance(condition, sympy.StrictLessThan | sympy.StrictGreaterThan)
        return int(sympy.ceiling(root) - 1 if strict else sympy.floor(root))

    def _words(self, condition: Any) -> str:
        names = {symbol: sympy.Symbol("batch") for symbol in condition.free_symbols}
        names[self._length] = sympy.Symbol("length")
        return str(condition.xreplace(names))
