"""The weight files of a checkpoint folder, found as transformers finds them, and nothing left over.

model.safetensors, or the shards that model.safetensors.index.json names; where there are neither,
pytorch_model.bin and its index. A shard that is there but would not be read is an error.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fxquant.errors import CheckpointError, ModelError
from fxquant.files.doors import check_regular, kind_of, printable, read_object
from fxquant.files.pickled import read_pickled
from fxquant.files.tensor_file import CODES, TensorFile

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
PICKLED: Final = "pytorch_model*.bin"
PICKLED_INDEX: Final = "pytorch_model.bin.index.json"
# Formats of safetensors files, as their metadata name them, whose weights are PyTorch's. Files of
# TensorFlow and flax hold the same names with other layouts.
_FORMATS: Final = ("pt", "mlx")


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its file and what it is; ``source`` reads it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: TensorFile | Tensor

    def read(self) -> Tensor:
        """The tensor, on the CPU, as it is stored."""
        return self.source if isinstance(self.source, Tensor) else self.source.read(self.name)


def stored_weights(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by name. Raises ModelError naming file and tensor."""
    if any(directory.glob("model*.safetensors")) or (directory / INDEX).exists():
        return safetensors_weights(directory)
    if not any(directory.glob(PICKLED)) and not (directory / PICKLED_INDEX).exists():
        raise ModelError(
            f"cannot load {directory}: it holds no weights ({WEIGHTS} or {PICKLED}); "
            "save_pretrained writes them"
        )
    found: dict[str, Stored] = {}
    for path in pickled_files(directory):
        for name, tensor in read_pickled(path).items():
            if name in found:
                raise ModelError(f"{path} holds {name}, which another file holds too")
            found[name] = Stored(path, name, tuple(tensor.shape), tensor.dtype, tensor)
    return found


def safetensors_weights(directory: Path) -> dict[str, Stored]:
    """Every tensor of the safetensors files, which are mapped, not read.

    Raises ModelError: no such files, one that is damaged or of another framework, an index that
    names other files or other tensors than are there.
    """
    indexed = _indexed(directory)
    files = [_open(directory / name) for name in (indexed or (WEIGHTS,))]
    found: dict[str, Stored] = {}
    for file in files:
        for name, entry in file.entries.items():
            if name in found:
                raise ModelError(f"{file.path} holds {name}, which another file holds too")
            found[name] = Stored(file.path, name, entry.shape, entry.dtype, file)
        if indexed:
            _compare(directory / INDEX, file.path.name, indexed[file.path.name], set(file.entries))
    return found


def _compare(index: Path, file: str, named: set[str], held: set[str]) -> None:
    for difference, what in (
        (named - held, f"which {file} does not hold"),
        (held - named, f"which {file} holds"),
    ):
        if difference:
            verb = "does not name" if difference <= held else "names"
            raise ModelError(
                f"{index} {verb} {listed(difference)}, {what}: index and files are not of one save"
            )


def _open(path: Path) -> TensorFile:
    check_regular(path, ModelError)
    try:
        file = TensorFile.open(path)
    except CheckpointError as error:
        raise ModelError(f"{path.parent} cannot be read: {error}") from error
    codes = [
        n for n, dtype in CODES.items() if any(e.dtype is dtype for e in file.entries.values())
    ]
    if codes:
        raise ModelError(
            f"{path} holds tensors of type {' and '.join(codes)}: a quantized checkpoint? fxquant "
            "starts from the float one"
        )
    if file.metadata is not None and file.metadata.get("format") not in _FORMATS:
        found = file.metadata.get("format")
        is_now = "its metadata name no format" if found is None else f"its format is {found!r}"
        raise ModelError(
            f"{path} was not written for PyTorch: {is_now}, not {_FORMATS[0]!r}; load the model in "
            "the framework that it is of, and write it with save_pretrained of a PyTorch model"
        )
    return file


def _indexed(directory: Path) -> dict[str, set[str]]:
    """Tensors by file, as the index has them; empty where model.safetensors is the only file."""
    shards = {path.name for path in directory.glob("model*.safetensors")}
    if (directory / INDEX).exists():
        named = read_index(directory / INDEX)
        _nothing_left(directory, shards - set(named), INDEX)
        if WEIGHTS in shards:  # transformers looks for it before the index
            _nothing_left(directory, set(named) - {WEIGHTS}, WEIGHTS)
        return named
    if WEIGHTS not in shards:
        raise ModelError(f"{directory} holds no safetensors files to stream: {_way_out(directory)}")
    _nothing_left(directory, shards - {WEIGHTS}, WEIGHTS)
    return {}


def _nothing_left(directory: Path, extra: set[str], read: str) -> None:
    if extra:
        raise ModelError(
            f"{directory} holds {listed(extra)}, which would not be read beside {read}: move away "
            "what does not belong to the model"
        )


def _way_out(directory: Path) -> str:
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        return f"{others[0]} is neither {WEIGHTS} nor named by {INDEX}"
    if any(directory.glob(PICKLED)):
        written = shlex.join(["fxquant", "safetensors", str(directory)])
        return f"{written} writes them from its {PICKLED}, one shard at a time"
    return "save the model with save_pretrained(directory)"


def read_index(path: Path) -> dict[str, set[str]]:
    """Names of tensors by file name, from an index's weight_map.

    Raises ModelError: no JSON object, no metadata (which transformers asks for), no weight_map of
    texts, a file of another kind, outside of the folder or one that is not there.
    """
    index = read_object(path, ModelError)
    named = index.get("weight_map")
    if not isinstance(named, Mapping) or not named:
        what = "is empty" if named == {} else f"is {kind_of(named)}, not an object"
        raise ModelError(f"{path}: weight_map {what if named is not None else 'is missing'}")
    files: defaultdict[str, set[str]] = defaultdict(set)
    for tensor, file in named.items():
        if not isinstance(file, str) or not file:
            raise ModelError(
                f"{path}: weight_map.{printable(tensor)} is {kind_of(file)}, not a file's name"
            )
        if file != Path(file).name or not file.isprintable():
            raise ModelError(
                f"{path}: weight_map.{printable(tensor)} is {printable(file)!r}, which is no file "
                "of this folder"
            )
        if not file.endswith(_ending(path)):  # transformers reads a file as what its name says
            raise ModelError(
                f"{path}: weight_map.{printable(tensor)} is {file!r}, whose name does not end in "
                f"{_ending(path)}"
            )
        files[file].add(tensor)
    missing = sorted(name for name in files if not (path.parent / name).exists())
    if missing:
        raise ModelError(f"{path.parent} lacks {listed(missing)}, which {path.name} names")
    if not isinstance(index.get("metadata"), Mapping):
        raise ModelError(f"{path}: metadata must be an object, such as {{}}")
    return dict(sorted(files.items()))


def _ending(index: Path) -> str:
    return Path(index.name.removesuffix(".index.json")).suffix


def pickled_files(directory: Path) -> list[Path]:
    """pytorch_model*.bin to read: those of the index, where there is one. Raises ModelError."""
    index = directory / PICKLED_INDEX
    if not index.exists():
        files = sorted(directory.glob(PICKLED))
    else:
        files = [directory / name for name in read_index(index)]
    if not files:
        raise ModelError(f"{directory} holds no {PICKLED} to read weights from")
    return files


def listed(names: set[str] | list[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    shown = [printable(name) for name in sorted(names)]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more
