"""What a model decided by the sizes of its input while it was recorded: refused, or harmless."""

from __future__ import annotations

from typing import Any

import sympy
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxquant.errors import TracingError


class Guards:
    """A recorded graph has taken one side of each such decision; it must be the side of all inputs.

    Harmless are a longest length (whoever goes beyond is told by the model too, or by the probes)
    and that a size is not some number (1 mostly, which broadcasting asks; the probes have a batch
    and a length of 1).
    """

    def __init__(self, env: ShapeEnv, input_ids: Tensor) -> None:
        self._env = env
        self._length = input_ids.shape[1].node.expr  # type: ignore[union-attr]
        self._seen = 0

    def check(self) -> None:
        """Raise TracingError for a new decision that some inputs would take otherwise."""
        guards = self._env.guards[self._seen :]
        self._seen = len(self._env.guards)
        for guard in guards:
            if not self._harmless(guard.expr):
                raise TracingError(
                    f"it decides by the size of its input (whether {self._words(guard.expr)}), and "
                    "a graph holds one way only"
                )

    def _harmless(self, condition: Any) -> bool:
        if isinstance(condition, sympy.Ne):
            return True
        if isinstance(condition, sympy.LessThan | sympy.StrictLessThan):
            return bool(condition.lhs == self._length and condition.rhs.is_number)
        return False

    def _words(self, condition: Any) -> str:
        names = {symbol: sympy.Symbol("batch") for symbol in condition.free_symbols}
        names[self._length] = sympy.Symbol("length")
        return str(condition.xreplace(names))
