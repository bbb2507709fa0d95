"""Finished losses, kept in a folder so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

import fxquant
from fxquant.analysis.meter import Cost, Meter
from fxquant.errors import DataError
from fxquant.graph import CodedLinear, info


class Store:
    """Named numbers under one fingerprint: ``FOLDER/losses-<fingerprint>.jsonl``, a line each with
    what the number cost, so that a run that goes on reports the cost of the whole.

    Without a folder they live in memory only. A line that was cut off by an interruption is
    ignored. Raises DataError when the folder cannot be written.
    """

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self.values: dict[str, float] = {}
        self._costs: dict[str, Cost] = {}
        self._fresh: set[str] = set()
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
            if "seconds" in entry:
                self._costs[entry["name"]] = Cost(entry["forwards"], entry["seconds"])

    def put(self, name: str, value: float, cost: Cost) -> None:
        self.values[name] = value
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                entry = {
                    "name": name,
                    "value": value,
                    "forwards": cost.forwards,
                    "seconds": cost.seconds,
                }
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def remember(self, name: str, compute: Callable[[], float], meter: Meter) -> float:
        """The kept value, or else the computed one, which is kept then.

        A value that an earlier run kept brings its cost along; without one it marks the method's
        cost as partial.
        """
        if name not in self.values:
            before, started = meter.now.forwards, time.perf_counter()
            value = compute()
            seconds = time.perf_counter() - started
            self._fresh.add(name)
            self.put(name, value, Cost(meter.now.forwards - before, seconds))
        elif name not in self._fresh:
            self._fresh.add(name)  # its cost counts once
            meter.restore(self._costs.get(name))
        return self.values[name]


def fingerprint(gm: GraphModule, windows: Iterable[Tensor], scheme: str) -> str:
    """A hash of everything that the losses depend on.

    The graph with its weights, leaf modules, chosen codes and calibrated observers; the model's
    configuration; the windows; the scheme; device, threads, the versions of what computes and this
    package's own source.
    """
    digest = hashlib.sha256()
    versions = [importlib.metadata.version(name) for name in ("fxquant", "torch", "transformers")]
    facts = (scheme, gm.code, info(gm).config, versions, source_digest(), torch.get_num_threads())
    digest.update(repr(facts).encode())
    for name, value in sorted((*gm.named_parameters(), *gm.named_buffers())):
        digest.update(name.encode())
        _add(digest, value)
    for path, module in gm.named_modules():
        if path and not any(module.children()):
            kind = type(module)
            leaf = (path, kind.__module__, kind.__qualname__, module.extra_repr())
            digest.update(repr(leaf).encode())
        if isinstance(module, CodedLinear):
            digest.update(repr(module.spec).encode())
    for ids in windows:
        _add(digest, ids)
    return digest.hexdigest()


@functools.cache
def source_digest() -> str:
    """A hash of the package's own modules, so that no loss outlives the code that measured it."""
    digest = hashlib.sha256()
    root = Path(fxquant.__file__).parent
    files = (Path(f, n) for f, _, names in os.walk(root, followlinks=True) for n in names)
    for file in sorted(each for each in files if each.suffix == ".py"):
        digest.update(str(file.relative_to(root)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _add(digest: hashlib._Hash, value: Tensor) -> None:
    stored = value.detach().cpu().contiguous()
    digest.update(f"{value.device.type} {stored.dtype} {tuple(stored.shape)}".encode())
    digest.update(stored.reshape(-1).view(torch.uint8).numpy().data)
