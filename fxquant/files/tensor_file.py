"""Tensors read one by one from a safetensors file that is mapped, never loaded whole.

The mapping is read-only and shared, so its pages belong to the page cache; what ``read`` returns
is a fresh, aligned copy (a GEMM may round differently on unaligned operands).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxquant.errors import CheckpointError
from fxquant.files.doors import parse_json, reason

OWN_PAGES = 2**20
WEIGHTS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
FLOATS = frozenset(dtype for dtype in WEIGHTS.values() if dtype.is_floating_point)
# Numbers that mean something with their scales alone: of saved graphs, and of no float model.
CODES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DTYPES = WEIGHTS | CODES


def dtype_name(dtype: torch.dtype) -> str:
    """``float16``: as torch calls it, without its own name in front."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the file, in bytes behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file: ``entries`` by name; ``read`` copies one tensor out of it.

    ``metadata``: what its writer noted, such as ``format``; None where it noted nothing.
    ``stamp``: which file it was, and its time; one that was written to since is not read on.
    """

    path: Path
    entries: dict[str, Entry]
    start: int
    mapping: mmap.mmap = field(repr=False, compare=False)
    metadata: dict[str, str] | None = None
    stamp: tuple[int, int, int] = (0, 0, 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorFile:
        return self  # immutable: copies of a graph read one file

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Map ``path``; CheckpointError if it is no intact safetensors file."""
        try:
            with safe_open(path, framework="np"):  # checks header, offsets and length
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = parse_json(file.read(length), unique=True)
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                stamp = _stamp(os.fstat(file.fileno()))
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {reason(error)}") from error
        metadata = header.pop("__metadata__", None)
        strangers = {entry["dtype"] for entry in header.values()} - set(DTYPES)
        if strangers:
            raise CheckpointError(f"{path} holds tensors of type {', '.join(sorted(strangers))}")
        entries = {
            name: Entry(DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"][0])
            for name, entry in header.items()
        }
        return cls(path, entries, 8 + length, mapping, metadata, stamp)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A fresh CPU tensor of the stored shape, in ``dtype`` (None: the stored one)."""
        return self._copied(self.entries[name], dtype)

    def read_part(self, name: str, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """``read(name, dtype)[index]``, of which nothing else is read."""
        entry = self.entries[name]
        shape = entry.shape[1:]
        begin = entry.begin + index * math.prod(shape) * entry.dtype.itemsize
        return self._copied(Entry(entry.dtype, shape, begin), dtype)

    def _copied(self, entry: Entry, dtype: torch.dtype | None) -> Tensor:
        self._check_unchanged()
        count = math.prod(entry.shape)
        result = _fresh(count, dtype or entry.dtype)
        if count:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the view is read-only, and is only read
                offset = self.start + entry.begin
                stored = torch.frombuffer(
                    self.mapping, dtype=entry.dtype, count=count, offset=offset
                )
            result.copy_(stored)
        return result.view(entry.shape)

    def _check_unchanged(self) -> None:
        """What was cut off a mapped file would end the process when it is read; a file that took
        the place of this one does no harm, since this one is still mapped."""
        cut = self.mapping.size() < len(self.mapping)
        with contextlib.suppress(OSError):
            now = _stamp(os.stat(self.path))
            cut = cut or (now[:2] == self.stamp[:2] and now != self.stamp)
        if cut:
            raise CheckpointError(
                f"{self.path} was written to while it was being read: let nothing write there, "
                "and read it again"
            )


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    """Which file it is, and when it was last written to."""
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _fresh(count: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor; a large one has pages of its own, which go back when it dies.

    malloc would keep matrices of up to 32 MB in its heap, where small tensors that live on pin the
    holes that they leave: a streamed run then grows by a matrix with every layer.
    """
    size = count * dtype.itemsize
    if size < OWN_PAGES:
        return torch.empty(count, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=count)


def storage_order(value: Tensor) -> tuple[int, ...]:
    """The permutation that makes a dense tensor contiguous: (1, 0) for a transposed matrix.

    Kept with the tensor, so that it is multiplied as it was before and rounds alike. The identity
    where no permutation does.
    """
    dims = tuple(range(value.dim()))
    order = tuple(sorted(dims, key=lambda dim: value.stride(dim), reverse=True))
    return order if value.permute(order).is_contiguous() else dims


def restore_order(stored: Tensor, order: Sequence[int]) -> Tensor:
    """The inverse of ``value.permute(order)``."""
    return stored.permute([order.index(dim) for dim in range(len(order))])
