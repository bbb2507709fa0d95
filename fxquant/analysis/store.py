"""Finished losses, kept in a folder so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.analysis.meter import Cost, Meter
from fxquant.files.doors import parse_json
from fxquant.files.line_file import LineFile, LineKind
from fxquant.ir.graph import info
from fxquant.ir.leaves import CodedLinear


@dataclass(frozen=True)
class Loss:
    """One line: a measured number, and what it cost where that is known."""

    name: str
    value: float
    cost: Cost | None

    def to_line(self, file: str) -> str:
        """JSON with a checksum, which is of the name of the file too."""
        entry: dict[str, object] = {"name": self.name, "value": self.value}
        if self.cost is not None:
            entry |= {"forwards": self.cost.forwards, "seconds": self.cost.seconds}
        return json.dumps({**entry, "check": _checksum(entry, file)}, allow_nan=False)

    @classmethod
    def from_line(cls, line: str, file: str) -> Loss:
        """The inverse of to_line. Raises ValueError for anything that it did not write."""
        entry = parse_json(line, strict=True)
        if not isinstance(entry, dict) or "check" not in entry:
            raise ValueError("it has no checksum")
        if entry.pop("check") != _checksum(entry, file):
            raise ValueError("its checksum is another")
        costs = [entry.pop(key) for key in ("forwards", "seconds") if key in entry]
        numbers = [entry.get("value"), *costs]
        if set(entry) != {"name", "value"} or not isinstance(entry["name"], str):
            raise ValueError("it does not have the fields of a loss")
        if len(costs) == 1 or any(type(number) not in (int, float) for number in numbers):
            raise ValueError("a field of it is no number")
        if any(number < 0 for number in costs):
            raise ValueError("its cost is negative")
        cost = Cost(float(costs[0]), float(costs[1])) if costs else None
        return cls(entry["name"], float(entry["value"]), cost)


def _checksum(entry: dict[str, object], file: str) -> str:
    return hashlib.sha256(f"{file} {json.dumps(entry)}".encode()).hexdigest()[:16]


class Store:
    """Named numbers under one fingerprint: ``FOLDER/losses-<fingerprint>.jsonl``, a line each with
    what the number cost, so that a run that goes on reports the cost of the whole.

    Without a folder they live in memory only. A context: within it the file is open, and in no
    other run's hands. Raises DataError for a damaged line (a last one that an interruption cut off
    is only cut away), WriteError where the file cannot be written.
    """

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self.values: dict[str, float] = {}
        self._costs: dict[str, Cost] = {}
        self._fresh: set[str] = set()
        self._file: LineFile[Loss] | None = None
        if folder is not None:
            path = folder / f"losses-{fingerprint[:16]}.jsonl"
            self._file = LineFile(path, _kind(path.name))

    def __enter__(self) -> Store:
        for line in self._file.__enter__().lines if self._file is not None else ():
            self.values[line.name] = line.value
            if line.cost is not None:
                self._costs[line.name] = line.cost
        return self

    def __exit__(self, *raised: object) -> None:
        if self._file is not None:
            self._file.__exit__(*raised)

    def put(self, name: str, value: float, cost: Cost) -> None:
        self.values[name] = value
        if self._file is not None:
            self._file.append(Loss(name, value, cost).to_line(self._file.path.name))

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


def _kind(file: str) -> LineKind[Loss]:
    return LineKind(
        parse=lambda line: Loss.from_line(line, file),
        plural="losses",
        wrong="no loss that this program wrote there",
        again="it measured",
    )


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
    root = Path(__file__).parents[1]
    files = (Path(f, n) for f, _, names in os.walk(root, followlinks=True) for n in names)
    for file in sorted(each for each in files if each.suffix == ".py"):
        digest.update(str(file.relative_to(root)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _add(digest: hashlib._Hash, value: Tensor) -> None:
    stored = value.detach().cpu().contiguous()
    digest.update(f"{value.device.type} {stored.dtype} {tuple(stored.shape)}".encode())
    digest.update(stored.reshape(-1).view(torch.uint8).numpy().data)
