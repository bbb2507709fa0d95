"""One run in many processes, as ``torchrun`` starts them: batches are shared out, results agree.

Without torchrun there is one process, and everything here does nothing. What is summed is summed
exactly (integer counts) or put in the order of the batches first, so that the number of processes
changes no figure. Only the main process (rank 0) writes and prints.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fxquant.errors import DistributedError
from fxquant.numerics.observers import Observer, Reduction

T = TypeVar("T")
TIMEOUT = datetime.timedelta(hours=2)  # a process may convert while another waits


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def is_mine(index: int) -> bool:
    """Whether batch ``index`` is this process's: they are dealt out in turn."""
    return index % world_size() == rank()


def shard(items: Iterable[T]) -> list[tuple[int, T]]:
    """This process's items with their places among all of them."""
    return [(index, item) for index, item in enumerate(items) if is_mine(index)]


def complete(rows: Tensor) -> Tensor:
    """``rows`` [N, ...] on every process, where each row is zero on all but one; exact."""
    if world_size() > 1:
        dist.all_reduce(rows, dist.ReduceOp.SUM)
    return rows


def merges_exactly(observer: Observer) -> bool:
    """Whether what several processes saw gives the same figures: extremes and integer counts do."""
    return not any(
        _is_float_sum(observer.reductions[name], value) for name, value in observer.named_buffers()
    )


def _is_float_sum(kind: Reduction, value: Tensor) -> bool:
    return kind == "sum" and value.is_floating_point()


def merge_observers(observers: Iterable[Observer]) -> None:
    """Let each observer know what its twins in the other processes have seen.

    Raises TypeError for a buffer that does not merge exactly (a float sum).
    """
    if world_size() == 1:
        return
    for observer in observers:
        for name, value in list(observer.named_buffers()):
            kind = observer.reductions[name]
            if _is_float_sum(kind, value):
                raise TypeError(f"{observer.site}: {name} is a float sum, its order would matter")
            merged = _same_shape(value, kind)
            dist.all_reduce(merged, getattr(dist.ReduceOp, kind.upper()))
            observer.register_buffer(name, merged)


def _same_shape(value: Tensor, kind: Reduction) -> Tensor:
    """``value``, or the neutral element where this process has seen nothing and others have."""
    shape = torch.zeros(8, dtype=torch.int64, device=value.device)
    shape[: value.dim()] = torch.tensor(value.shape, dtype=torch.int64)
    dist.all_reduce(shape, dist.ReduceOp.MAX)
    wanted = tuple(shape[: value.dim()].tolist())
    if value.numel() or wanted == tuple(value.shape):
        return value.clone()
    neutral = {"min": float("inf"), "max": float("-inf"), "sum": 0}[kind]
    return torch.full(wanted, neutral, dtype=value.dtype, device=value.device)


@contextlib.contextmanager
def session(device: str) -> Iterator[str]:
    """Join the other processes if torchrun started this one; yields this process's device.

    gloo on the CPU, nccl on CUDA, where each process takes the GPU of its local rank. Raises
    DistributedError when another process has died.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield device
        return
    cuda = device.startswith("cuda")
    if cuda:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(f"the processes do not find each other: {error}") from error
    with _stopped_by_signal():
        try:
            yield device
        except (dist.DistError, RuntimeError) as error:
            if not _is_connection_loss(error):
                raise
            raise DistributedError(_lost()) from error
        finally:
            dist.destroy_process_group()


def _is_connection_loss(error: Exception) -> bool:
    text = str(error)
    known = ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL", "Timed out")
    return isinstance(error, dist.DistError) or any(word in text for word in known)


def _lost() -> str:
    return (
        f"another process of this run has ended, so process {rank()} of {world_size()} stops too; "
        "finished rows are kept, nothing unfinished is written (its own message says why)"
    )


@contextlib.contextmanager
def _stopped_by_signal() -> Iterator[None]:
    """torchrun ends the others with SIGTERM when one process has failed: say so and stop."""

    def stop(_: int, __: FrameType | None) -> None:
        raise DistributedError(_lost())

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
