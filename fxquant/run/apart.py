"""A graph whose own tensors do not go together: on two devices, or of two float dtypes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor
from torch.fx import GraphModule

from fxquant.ir.leaves import QuantizedParameters
from fxquant.ir.streamed import sources_of

# Of torch's messages, those on operands that do not go together.
_OF_OPERANDS = re.compile(r"\bd?type\b|\bdevices?\b|scalar type", re.IGNORECASE)


def apart(gm: GraphModule, error: RuntimeError) -> str | None:
    """What ``error``, raised while the graph ran, comes of, if it comes of tensors of the graph
    that differ in device or float dtype; None if it does not."""
    if not _OF_OPERANDS.search(str(error)):
        return None
    devices, dtypes = dict[str, str](), dict[str, str]()
    for path, value, is_plain in _tensors(gm):
        devices.setdefault(str(value.device), path)
        if is_plain and value.is_floating_point():
            dtypes.setdefault(str(value.dtype).removeprefix("torch."), path)
    for what, found in (("on", devices), ("of", dtypes)):
        if len(found) > 1:
            (one, first), (other, second), *_ = found.items()
            return (
                f"the graph's tensors do not go together: {first} is {what} {one}, {second} "
                f"{what} {other} ({error}); move or cast the graph as a whole, as graph.to does"
            )
    return None


def _tensors(gm: GraphModule) -> Iterator[tuple[str, Tensor, bool]]:
    """(path, tensor, whether its float dtype is the graph's) of what is not read from files."""
    for path, module in gm.named_modules():
        streamed, is_plain = sources_of(module), not isinstance(module, QuantizedParameters)
        for name, value in module.named_parameters(recurse=False):
            if name not in streamed:
                yield f"{path}.{name}".lstrip("."), value, is_plain
        for name, value in module.named_buffers(recurse=False):
            if name not in streamed:
                yield f"{path}.{name}".lstrip("."), value, False
