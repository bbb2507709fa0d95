"""What torch's RuntimeError says of a graph that it cannot compute, where that is known."""

from __future__ import annotations

import re

from torch.fx import GraphModule

from fxquant.files.doors import reason
from fxquant.run.apart import apart

# Of torch's messages, those on values: operands of the same shapes are computed elsewhere.
_OF_VALUES = re.compile(
    r"out of (DATA )?bounds|without overflow|ZeroDivisionError|to negative integer powers|"
    r"repeats can(not| not) be negative"
)


def uncomputable(gm: GraphModule, error: RuntimeError) -> str | None:
    """What ``error``, raised while the graph ran, comes of: values that an operator does not take
    (an index beyond a tensor, integers divided by 0), tensors that are apart. None: not known."""
    if _OF_VALUES.search(str(error)):
        return f"the values of its operands are none that torch computes with ({reason(error)})"
    return apart(gm, error)
