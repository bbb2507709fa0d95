"""Finished blocks of a long repair on disk, so that an interrupted run resumes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fxquant.errors import DataError
from fxquant.passes.weight_codes import WeightCodes
from fxquant.specs import TensorSpec


@dataclass(frozen=True)
class BlockStore:
    """One safetensors file a block below ``folder / fingerprint``; folder None keeps nothing."""

    folder: Path | None
    fingerprint: str

    def load(
        self, block: str, specs: Mapping[str, TensorSpec], device: torch.device
    ) -> dict[str, WeightCodes] | None:
        """The block's codes by site, None if it was not finished; DataError for a damaged file."""
        path = self._path(block)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                notes = file.metadata() or {}
                return {
                    site: WeightCodes(
                        file.get_tensor(f"{site}.codes"),
                        file.get_tensor(f"{site}.scales"),
                        file.get_tensor(f"{site}.zero_points")
                        if spec.grid.has_zero_point
                        else None,
                        spec,
                        note=notes[site],
                    )
                    for site, spec in specs.items()
                }
        except (SafetensorError, KeyError) as error:
            raise DataError(f"{path} is damaged ({error}): delete it and run again") from error

    def save(self, block: str, chosen: Mapping[str, WeightCodes]) -> None:
        """Keep the block; whole or not at all."""
        path = self._path(block)
        if path is None or not chosen:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for site, one in chosen.items():
            tensors[f"{site}.codes"] = one.codes.contiguous()
            tensors[f"{site}.scales"] = one.scales.contiguous()
            if one.zero_points is not None:
                tensors[f"{site}.zero_points"] = one.zero_points.contiguous()
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, partial, {site: one.note for site, one in chosen.items()})
        partial.replace(path)

    def _path(self, block: str) -> Path | None:
        if self.folder is None:
            return None
        return Path(self.folder) / self.fingerprint / f"{block}.safetensors"
