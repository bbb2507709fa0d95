"""Finished blocks of a long repair on disk, so that an interrupted run resumes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import stat
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxquant.errors import CacheWarning
from fxquant.files.locks import hold_folder, reason
from fxquant.files.whole_file import replacing
from fxquant.numerics.quantization import group_count
from fxquant.numerics.weight_codes import WeightCodes
from fxquant.run.distributed import is_main
from fxquant.schemes.specs import TensorSpec

CHECKSUM = "sha256"
# What reading a file raises that another program wrote or that lost bytes.
_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError)


@dataclass(frozen=True)
class Expected:
    """What a site's codes must be: codes of a weight ``shape`` (N, K) under ``spec``."""

    spec: TensorSpec
    shape: tuple[int, int]

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Of scales and zero points."""
        rows, columns = self.shape
        if self.spec.granularity == "tensor":
            return ()
        return rows, group_count(columns, self.spec.group_size or columns)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors that a file has for it."""
        more = {
            "zero_points": self.spec.grid.has_zero_point,
            "global_scale": self.spec.scale.two_level,
        }
        return ("codes", "scales", *(name for name, there in more.items() if there))

    def check(self, site: str, found: WeightCodes) -> None:
        """Raise ValueError where a solver would never have chosen this."""
        grid, codes, scales = self.spec.grid, found.codes, found.scales
        zero_points = found.zero_points
        if (zero_points is None) is grid.has_zero_point:
            raise ValueError(f"{site}: zero points are there exactly where {grid.name} has them")
        tensors = [
            ("codes", codes, grid.storage, self.shape),
            ("scales", scales, torch.float32, self.grid_shape),
        ]
        if zero_points is not None:
            tensors.append(("zero_points", zero_points, torch.int32, self.grid_shape))
        if found.global_scale is not None:
            tensors.append(("global_scale", found.global_scale, torch.float32, ()))
        for name, value, dtype, shape in tensors:
            if value.dtype != dtype or tuple(value.shape) != shape:
                is_now = f"{value.dtype} {tuple(value.shape)}"
                raise ValueError(f"{site}.{name} is {is_now}, not {dtype} {shape}")
        low, high = grid.codes
        if not grid.valid(codes):
            raise ValueError(f"{site}.codes are not all codes of {grid.name}")
        for name, each in (("scales", scales), ("global_scale", found.global_scale)):
            if each is not None and not bool((torch.isfinite(each) & (each > 0)).all()):
                raise ValueError(f"{site}.{name} is not all finite and positive")
        kept = self.spec.scale.encode(scales, found.global_scale)
        if not torch.equal(self.spec.scale.decode(kept, found.global_scale), scales):
            raise ValueError(f"{site}.scales are not all numbers of {self.spec.scale.name}")
        if zero_points is not None and not bool(
            ((zero_points >= low) & (zero_points <= high)).all()
        ):
            raise ValueError(f"{site}.zero_points leave {low}..{high}")


@dataclass(frozen=True)
class BlockStore:
    """One safetensors file a block below ``folder / fingerprint``; folder None keeps nothing.

    A file that is damaged is as good as none: the block is computed again, which a warning says.
    Of the processes of one run, the main one writes.
    """

    folder: Path | None
    fingerprint: str

    def held(self) -> AbstractContextManager[None]:
        """While the blocks are read and written; WriteError where another run does that."""
        if self.folder is None or not is_main():
            return contextlib.nullcontext()
        return hold_folder(Path(self.folder) / self.fingerprint, "cache folder")

    def load(
        self, block: str, expected: Mapping[str, Expected], device: torch.device
    ) -> dict[str, WeightCodes] | None:
        """The block's codes by site, None where there is no intact file of it."""
        path = self._path(block)
        if path is None:
            return None
        try:
            return self._read(block, path, expected, device)
        except FileNotFoundError:
            return None
        except _UNREADABLE as error:
            if is_main():
                warnings.warn(
                    f"{path} is damaged ({reason(error)}): the block is computed again",
                    CacheWarning,
                    stacklevel=2,
                )
            return None

    def _read(
        self, block: str, path: Path, expected: Mapping[str, Expected], device: torch.device
    ) -> dict[str, WeightCodes]:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError("it is no regular file")
        with safe_open(path, "pt") as file:
            notes = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if notes.pop(CHECKSUM, None) != self._checksum(block, tensors, notes):
            raise ValueError("its checksum is missing or does not fit its content")
        places = [f"{site}.{name}" for site, each in expected.items() for name in each.names]
        if notes.keys() != expected.keys() or set(places) != set(tensors):
            raise ValueError("it holds other sites than the block")
        found = {}
        for site, each in expected.items():
            own = {name: tensors[f"{site}.{name}"].to(device) for name in each.names}
            read = WeightCodes(
                own["codes"],
                own["scales"],
                own.get("zero_points"),
                each.spec,
                note=notes[site],
                global_scale=own.get("global_scale"),
            )
            each.check(site, read)
            found[site] = read
        return found

    def save(self, block: str, chosen: Mapping[str, WeightCodes]) -> None:
        """Keep the block; whole or not at all (WriteError)."""
        path = self._path(block)
        if path is None or not chosen or not is_main():
            return
        tensors = {}
        for site, one in chosen.items():
            tensors[f"{site}.codes"] = one.codes.contiguous()
            tensors[f"{site}.scales"] = one.scales.contiguous()
            if one.zero_points is not None:
                tensors[f"{site}.zero_points"] = one.zero_points.contiguous()
            if one.global_scale is not None:
                tensors[f"{site}.global_scale"] = one.global_scale.reshape(-1)[0].clone()
        notes = {site: one.note for site, one in chosen.items()}
        notes[CHECKSUM] = self._checksum(block, tensors, notes)
        advice = (
            "; finished blocks are kept there, and the same command goes on from them when it can "
            "write again"
        )
        with replacing(path, advice=advice) as partial:
            save_file(tensors, partial, notes)

    def _checksum(self, block: str, tensors: Mapping[str, Tensor], notes: dict[str, str]) -> str:
        """Of all that the file holds, and of which block of which run it is."""
        digest = hashlib.sha256(
            json.dumps([self.fingerprint, block, sorted(notes.items())]).encode()
        )
        for name, value in sorted(tensors.items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _path(self, block: str) -> Path | None:
        if self.folder is None:
            return None
        return Path(self.folder) / self.fingerprint / f"{block}.safetensors"
