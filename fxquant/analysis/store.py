"""Finished losses, kept in a folder so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.errors import DataError
from fxquant.graph import CodedLinear


class Store:
    """Named numbers under one fingerprint: ``FOLDER/losses-<fingerprint>.jsonl``, a line each.

    Without a folder they live in memory only. A line that was cut off by an interruption is
    ignored. Raises DataError when the folder cannot be written.
    """

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self.values: dict[str, float] = {}
        self._path: Path | None = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / f"losses-{fingerprint[:16]}.jsonl"
            text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
            complete = text[: text.rfind("\n") + 1]
            self._path.write_text(complete, encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write to output folder {folder}: {error}") from error
        for line in complete.splitlines():
            entry = json.loads(line)
            self.values[entry["name"]] = entry["value"]

    def put(self, name: str, value: float) -> None:
        if name in self.values:
            return
        self.values[name] = value
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name, "value": value}) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def remember(self, name: str, compute: Callable[[], float]) -> float:
        """The kept value, or else the computed one, which is kept then."""
        if name not in self.values:
            self.put(name, compute())
        return self.values[name]

    def under(self, prefix: str) -> dict[str, float]:
        """The values whose names begin with ``prefix``, without it."""
        return {
            name.removeprefix(prefix): value
            for name, value in self.values.items()
            if name.startswith(prefix)
        }


def fingerprint(gm: GraphModule, windows: Iterable[Tensor], scheme: str) -> str:
    """A hash of everything that the losses depend on.

    The graph with its weights, chosen codes and calibrated observers; the windows; the scheme;
    device, threads and the versions of what computes.
    """
    digest = hashlib.sha256()
    versions = [importlib.metadata.version(name) for name in ("fxquant", "torch", "transformers")]
    facts = (scheme, gm.code, versions, torch.get_num_threads())
    digest.update(repr(facts).encode())
    for name, value in sorted((*gm.named_parameters(), *gm.named_buffers())):
        digest.update(name.encode())
        _add(digest, value)
    for module in gm.modules():
        if isinstance(module, CodedLinear):
            digest.update(repr(module.spec).encode())
    for ids in windows:
        _add(digest, ids)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, value: Tensor) -> None:
    stored = value.detach().cpu().contiguous()
    digest.update(f"{value.device.type} {stored.dtype} {tuple(stored.shape)}".encode())
    digest.update(stored.reshape(-1).view(torch.uint8).numpy().data)
