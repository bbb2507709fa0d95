"""Where a streamed tensor comes from: a tensor of a file, a part of one, or several joined."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fxquant.files.tensor_file import TensorFile, restore_order


@dataclass(frozen=True)
class Source:
    """A tensor in a file, the dtype and device that it is read to, and its storage_order.

    ``part``: of the stored tensor only what this index of its first dimension holds.
    """

    file: TensorFile
    key: str
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...] | None = None
    part: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return self

    def read(self) -> Tensor:
        if self.part is None:
            value = self.file.read(self.key, self.dtype)
        else:
            value = self.file.read_part(self.key, self.part, self.dtype)
        value = value.to(self.device)
        return value if self.order is None else restore_order(value, self.order)

    @property
    def shape(self) -> tuple[int, ...]:
        stored = self.file.entries[self.key].shape[0 if self.part is None else 1 :]
        return (
            stored
            if self.order is None
            else tuple(stored[self.order.index(d)] for d in range(len(stored)))
        )

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for two sources of one tensor."""
        return (str(self.file.path), self.key, self.part, self.order, self.dtype)

    def at(self, index: int) -> Source:
        """The source of ``read()[index]``."""
        assert self.part is None
        assert self.order is None
        return replace(self, part=index)


@dataclass(frozen=True)
class Joined:
    """A tensor that files hold in pieces: ``stacked`` along a new first dimension, or put one
    behind the other along the first that they have."""

    pieces: tuple[AnySource, ...]
    stacked: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> Joined:
        return self

    def read(self) -> Tensor:
        values = [piece.read() for piece in self.pieces]
        return torch.stack(values) if self.stacked else torch.cat(values)

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    @property
    def device(self) -> torch.device:
        return self.pieces[0].device

    @property
    def order(self) -> tuple[int, ...] | None:
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        first, *rest = self.pieces[0].shape
        if self.stacked:
            return (len(self.pieces), first, *rest)
        return (sum(piece.shape[0] for piece in self.pieces), *rest)

    @property
    def identity(self) -> tuple[Any, ...]:
        return (self.stacked, *(piece.identity for piece in self.pieces))

    def at(self, index: int) -> AnySource:
        """The source of ``read()[index]``."""
        assert self.stacked
        return self.pieces[index]


AnySource: TypeAlias = Source | Joined


def turned(source: AnySource) -> AnySource:
    """The source of ``read().t()``, whose values lie as the stored ones do."""
    assert isinstance(source, Source)
    assert source.order is None
    return replace(source, order=(1, 0))
