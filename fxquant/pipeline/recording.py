"""Batches that know where they are from, and a look over the shoulder of a pass that reads some."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.errors import FxquantError
from fxquant.files.tensor_file import dtype_name
from fxquant.ir.calibration import CalibrationRecord, Origin, Reading, joined, versions
from fxquant.ir.graph import device_of, float_dtype, info, update_info
from fxquant.ir.token_runs import written_runs
from fxquant.pipeline.context import Context
from fxquant.run.batches import Batch, Batches
from fxquant.run.encodings import encoding


@dataclass(frozen=True)
class DrawnBatches:
    """Batches int64 [rows, length] of windows that were drawn from a text."""

    batches: Sequence[Batch]
    origin: Origin

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class Recording:
    """Hands on the batches of an iterable, keeping hashes of what was taken."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._ids: list[Tensor] = []
        self._tokens = 0
        self._runs: list[str] = []
        self.taken = 0

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(self._batches):
            if index == self.taken:
                self._look_at(batch)
                self.taken += 1
            yield batch

    @property
    def batches(self) -> Batches:
        """To look at without a trace."""
        return self._batches

    def checked(self, batches: Sequence[Batch]) -> None:
        """Hand on ``batches``, the same in another form, from the same origin."""
        drawn = self._batches
        self._batches = batches
        if isinstance(drawn, DrawnBatches):
            self._batches = replace(drawn, batches=batches)

    def _look_at(self, batch: Batch) -> None:
        """Batches that are none are left to the pass, which says what is wrong with them."""
        try:
            given = encoding(batch, "calibration")
        except FxquantError:
            return
        found, mask = given["input_ids"], given.get("attention_mask")
        if found.dim() != 2 or found.dtype != torch.int64:
            return
        ids = found.detach().cpu()
        kept = torch.ones_like(ids, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            kept = mask.detach().cpu().bool()
        self._ids.append(ids)
        self._tokens += int(kept.sum())
        for row, attended in zip(ids, kept, strict=True):
            self._runs.append(written_runs(row[attended]))

    def record(self, gm: GraphModule, name: str) -> CalibrationRecord:
        """What the pass spelled ``name`` read to make ``gm``."""
        hashes = [hashlib.sha256(_content(ids)).hexdigest() for ids in self._ids]
        whole = hashlib.sha256(b"".join(map(_content, self._ids)))
        shapes = groupby((ids.shape[0], ids.shape[1]) for ids in self._ids)
        origin = self._batches.origin if isinstance(self._batches, DrawnBatches) else None
        if origin is not None:
            rows = sum(len(ids) for ids in self._ids)
            origin = replace(origin, spans=origin.spans.first(rows))
        return CalibrationRecord(
            shapes=tuple((len(list(alike)), *shape) for shape, alike in shapes),
            tokens=self._tokens,
            ids_hash=f"sha256:{whole.hexdigest()}",
            readings=(Reading(name, self.taken),),
            dtype=dtype_name(float_dtype(gm)),
            device=str(device_of(gm)),
            versions=versions(),
            origin=origin,
            batch_hashes=tuple(each[:16] for each in hashes),
            runs="".join(self._runs),
        )


def _content(ids: Tensor) -> bytes:
    return f"{list(ids.shape)}".encode() + ids.contiguous().numpy().tobytes()


class SizedRecording(Recording):
    """Of batches whose number is known."""

    def __len__(self) -> int:
        assert isinstance(self._batches, Sized)
        return len(self._batches)


def record_of(
    batches: DrawnBatches | Sequence[Batch], gm: GraphModule, name: str
) -> CalibrationRecord:
    """The record of all ``batches``, read by ``name`` for ``gm``."""
    recording = SizedRecording(batches)
    for _ in recording:
        pass
    return recording.record(gm, name)


def recorded(context: Context) -> tuple[Context, Recording | None]:
    """The context with its batches looked at as they are read; None where it has none."""
    if context.batches is None:
        return context, None
    kind = SizedRecording if isinstance(context.batches, Sized) else Recording
    recording = kind(context.batches)
    return replace(context, batches=recording), recording


def remember(gm: GraphModule, recording: Recording | None, name: str) -> None:
    """Add what was read, if anything was, to what is known of the graph."""
    if recording is not None and recording.taken:
        found = joined(info(gm).calibration, recording.record(gm, name))
        update_info(gm, calibration=found)
