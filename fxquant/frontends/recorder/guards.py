"""What a model decided by the sizes of its input while it was recorded: refused, or harmless."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import Mod, PythonMod

from fxquant.errors import TracingError

# What conditions are tried on.
_LENGTHS, _BATCHES = (1, 2, 3, 7, 8, 9, 63, 64, 65, 1000), (1, 3, 8, 33)
_ORDERED = (sympy.LessThan, sympy.StrictLessThan, sympy.GreaterThan, sympy.StrictGreaterThan)


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
        for condition in self._new():
            if self._always(condition):
                continue
            longest = self._most(condition)
            if longest is None:
                raise TracingError(self._reason(condition))
            self.longest = longest if self.longest is None else min(self.longest, longest)

    def check_inside(self) -> None:
        """As ``check``, of what an operator decided that stands in the graph and decides anew
        whenever it runs. A size that it needs equal to something is no less fixed by that."""
        for condition in self._new():
            if isinstance(condition, sympy.Eq) and not self._always(condition):
                raise TracingError(f"it takes inputs with {self._words(condition)} only")

    def _new(self) -> list[Any]:
        new = [guard.expr for guard in self._env.guards[self._seen :]]
        self._seen += len(new)
        return [each for each in new if not isinstance(each, sympy.Ne) or each.has(Mod, PythonMod)]

    def _always(self, condition: Any) -> bool:
        """Whether ``condition`` holds for every batch and length that is tried."""
        others = condition.free_symbols - {self._length}
        return all(
            condition.xreplace({self._length: sympy.Integer(length)}).xreplace(
                {other: sympy.Integer(batch) for other in others}
            )
            == sympy.true
            for length in _LENGTHS
            for batch in _BATCHES
        )

    def _reason(self, condition: Any) -> str:
        if isinstance(condition, sympy.Eq) and condition.lhs.is_symbol and condition.rhs.is_number:
            name = "length" if condition.lhs == self._length else "batch"
            return (
                f"it takes the {name} of its input as a number of Python, as a loop over it does, "
                "and a graph holds one size only"
            )
        return (
            f"it decides by the size of its input (whether {self._words(condition)}), and a graph "
            "holds one way only"
        )

    def _most(self, condition: Any) -> int | None:
        """The largest length for which ``condition`` holds, if it holds for all below."""
        if not isinstance(condition, _ORDERED) or condition.free_symbols != {self._length}:
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
        words = condition.xreplace(names)
        return f"{words.lhs} = {words.rhs}" if isinstance(words, sympy.Eq) else str(words)
