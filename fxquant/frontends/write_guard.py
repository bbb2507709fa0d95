"""A mode under which a model that writes into its own tensors is stopped before it does.

Copies share the storage of the user's model, which must stay as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant.errors import ModelError


class NoWrites(TorchDispatchMode):
    """Raises ModelError, naming the tensor, at an operation that writes into one of ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = itertools.chain(module.named_parameters(), module.named_buffers())
        self._names = {_storage(value): name for name, value in tensors if not value.is_meta}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func._schema.is_mutable:
            for declared, value in zip(func._schema.arguments, args, strict=False):
                written = declared.alias_info is not None and declared.alias_info.is_write
                if written and isinstance(value, Tensor) and _storage(value) in self._names:
                    raise ModelError(
                        f"the model writes into its own {self._names[_storage(value)]} when it is "
                        f"called ({func}): each call would compute something else, and a graph "
                        "has one function"
                    )
        return func(*args, **(kwargs or {}))


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)
