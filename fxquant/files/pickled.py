"""Tensors of pytorch_model*.bin: read without running what a pickle may hold, and checked."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fxquant.errors import ModelError
from fxquant.files.doors import check_regular, printable, reason
from fxquant.files.tensor_file import WEIGHTS, dtype_name

# What torch's restricted unpickler raises for files that are damaged or hold more than tensors.
_UNREADABLE: Final = (
    OSError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, LookupError,
    AssertionError, pickle.UnpicklingError,
)  # fmt: skip
# A view of fewer stored elements is written out up to here.
REPEATED_BYTES: Final = 2**20
_KNOWN: Final = frozenset(WEIGHTS.values())


def read_pickled(file: Path) -> dict[str, Tensor]:
    """A file's tensors by name, mapped: read when they are used.

    Pickles from before torch 1.6 cannot be mapped. Raises ModelError, naming file and tensor: not
    readable, anything but named dense tensors of the usual dtypes, a large tensor that repeats the
    few elements stored for it.
    """
    check_regular(file, ModelError)
    try:
        mapped = zipfile.is_zipfile(file)
        found = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except _UNREADABLE as error:
        raise ModelError(f"cannot read weights from {file}: {reason(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} holds no dictionary of tensors but a {type(found).__name__}")
    for name, value in found.items():
        wrong = _wrong(name, value)
        if wrong:
            raise ModelError(f"{file} holds more than named tensors: {_shown(name)} {wrong}")
    return found


def _shown(name: object) -> str:
    return repr(printable(name[:200]) if isinstance(name, str) else name)


def _wrong(name: object, value: object) -> str:
    """Why this is no entry of a state dict, or nothing."""
    if not isinstance(name, str):
        return f"is a name of type {type(name).__name__}, not text"
    if not name.isprintable() or not name or name == "__metadata__":
        return "is no name of a tensor"
    if not isinstance(value, Tensor):
        return "is none"
    if value.is_nested or value.layout != torch.strided:
        return "is a sparse or nested tensor: store it dense (Tensor.to_dense)"
    if value.is_quantized:
        return "is a quantized tensor: store it dequantized"
    if value.dtype not in _KNOWN:
        return f"is of type {dtype_name(value.dtype)}"
    return _not_stored(value)


def _not_stored(value: Tensor) -> str:
    """A view may claim more elements than the file has: 2**40 of them from a single one."""
    if value.is_meta:
        return "is a tensor without data (on the meta device)"
    size = value.numel() * value.element_size()
    if size > max(REPEATED_BYTES, value.untyped_storage().nbytes()):
        return f"has shape {list(value.shape)}, but the file stores fewer elements"
    return ""
