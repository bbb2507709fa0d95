"""``fxquant safetensors DIR``: pytorch_model*.bin as safetensors files, which can be streamed.

Repositories of older models hold pickles only, which cannot be read tensor by tensor from where
they lie. Each is mapped and written again in small shards: memory holds one of those.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from fxquant.errors import ModelError
from fxquant.files.doors import Location, as_path
from fxquant.files.locks import LOCK, hold
from fxquant.files.pickled import read_pickled
from fxquant.frontends.weight_files import INDEX, PICKLED, pickled_files

SHARD_BYTES: Final = 2**29
_PARTIAL: Final = ".safetensors-"


def to_safetensors(directory: Location) -> list[Path]:
    """Write the tensors of ``directory``'s pytorch_model*.bin beside them, as safetensors shards
    with an index; the files' paths. Names that share memory get a copy each.

    Nothing is left behind where it fails. Raises ModelError: no such files there, safetensors
    there already, a file that holds anything but named tensors.
    """
    directory = as_path(directory, "directory", ModelError)
    if not directory.is_dir():
        raise ModelError(
            f"{directory} is no folder: it holds no {PICKLED} to write safetensors from"
        )
    with hold(directory / LOCK, str(directory), ModelError):
        return _to_safetensors(directory)


def _to_safetensors(directory: Path) -> list[Path]:
    if any(directory.glob("*.safetensors")) or (directory / INDEX).exists():
        raise ModelError(
            f"{directory} holds safetensors files already: nothing to do, or move them away first"
        )
    files = pickled_files(directory)
    for left in directory.glob(f"{_PARTIAL}*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=directory) as partial:
            return _publish(directory, Path(partial), _write(files, Path(partial)))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot write safetensors files to {directory}: {error}") from error


def _write(files: list[Path], folder: Path) -> dict[Path, dict[str, int]]:
    """Shards in ``folder``, each with its tensors' sizes in bytes."""
    written: dict[Path, dict[str, int]] = {}
    seen: set[str] = set()
    for file in tqdm(files, "files", unit="file", disable=None):
        for shard in _shards(read_pickled(file)):
            twice = seen & set(shard)
            if twice:
                raise ModelError(f"{file} holds {min(twice)}, which another file holds too")
            seen |= set(shard)
            path = folder / f"{len(written)}.safetensors"
            save_file(shard, path, {"format": "pt"})
            written[path] = {name: tensor.nbytes for name, tensor in shard.items()}
    return written


def _shards(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Groups of at most SHARD_BYTES, in order; a larger tensor is alone in its group."""
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        # The format has no names that share memory, and only contiguous tensors.
        held = {each.untyped_storage().data_ptr() for each in shard.values()}
        own = tensor.detach().contiguous()
        shard[name] = own.clone() if own.untyped_storage().data_ptr() in held else own
    if shard:
        yield shard


def _publish(directory: Path, partial: Path, written: dict[Path, dict[str, int]]) -> list[Path]:
    """Move the shards to their names in ``directory``; the index, which is read first, last."""
    names = [f"model-{n + 1:05}-of-{len(written):05}.safetensors" for n in range(len(written))]
    shards = list(zip(names, written.values(), strict=True))
    index = {
        "metadata": {"total_size": sum(sum(sizes.values()) for _, sizes in shards)},
        "weight_map": {tensor: name for name, sizes in shards for tensor in sizes},
    }
    (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    paths = [path.rename(directory / name) for path, name in zip(written, names, strict=True)]
    (partial / INDEX).rename(directory / INDEX)
    return paths
