"""A graph as a torch.export program of aten operators, and what such a file computes elsewhere."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

import fxquant.exports.fresh as fresh_program
from fxquant.errors import ExportError
from fxquant.exports.check import ALLOWED, Checked, compared, random_tokens, unchecked, version
from fxquant.files.doors import printable
from fxquant.files.native_writers import held_errors
from fxquant.files.temporary import room_for, temporary_folder
from fxquant.frontends.patching import exclusive, exporting
from fxquant.ir.graph import clone_sharing_storage, info
from fxquant.ir.leaves import QuantizedParameters
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operators import WRITTEN_OUT

INPUTS: Final = ("input_ids", "attention_mask")
_BOUND: Final = 1200.0  # seconds
_NOISE: Final = 2.0**-22  # of a float: some roundings of fp32
_SEEDS: Final = 8

_TABLE: Final[dict[Any, Callable[..., Any]]] = {
    getattr(OPS, name).default: function for name, function in WRITTEN_OUT.items()
}

Kind = Literal["pt2", "aoti"]


@exclusive  # torch.export replaces functions of torch and sets flags for all threads
def exported(gm: GraphModule) -> torch.export.ExportedProgram:
    """The program: input_ids and attention_mask int64 [batch, length], any size, to logits.

    Operators of fxquant are written out in aten's, those of aten stay whole, so that sums have the
    graph's order. Products of codes are float products that hold every sum, which are exact on any
    processor; the graph may take the processor's own, to the same sums.
    """
    with quietly(), exporting():
        return of_any_size(_written_out(gm))


def of_any_size(gm: GraphModule) -> torch.export.ExportedProgram:
    """The program of the graph's own operators; in a block of ``exporting``. Its length is 1 where
    the model holds no more."""
    most = info(gm).max_positions or 64
    ids = torch.zeros(2, min(7, most), dtype=torch.int64)
    any_size = dict.fromkeys((0, 1) if most > 1 else (0,), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        return torch.export.export(
            gm,
            (),
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            dynamic_shapes=dict.fromkeys(INPUTS, any_size),
            strict=False,
        )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what torch says of parts of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _written_out(gm: GraphModule) -> GraphModule:
    """A copy whose nodes call what an operator is made of instead of the operator."""
    copy = clone_sharing_storage(gm)
    for node in copy.graph.nodes:
        node.target = _TABLE.get(node.target, node.target)
    copy.recompile()
    return copy


def on_cpu(gm: GraphModule) -> GraphModule:
    """A copy, in the graph's own dtype."""
    return clone_sharing_storage(gm).cpu()


def elsewhere(
    kind: Kind, file: Path, gm: GraphModule, wanted: bool, compiler: str, cause: str
) -> Checked:
    """What a fresh process computes from ``file`` beside the graph, on random tokens, if that is
    ``wanted``."""
    skipped = unchecked(gm, wanted, ())
    if skipped is not None:
        return skipped
    engine = f"{compiler}{version('torch')} in a fresh process, without fxquant"
    probes = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in random_tokens(gm)
    ]
    results = _run(kind, file, probes)
    each = iter(results)
    own = on_cpu(gm)
    with_mask = _masked(own)
    found = compared(own, engine, lambda _: next(each), with_mask, lambda: cause, with_mask)
    if kind == "pt2" or not _codes_inputs(gm):
        return found
    logits = _logits(own)
    moved, moved_mean = _sensitivity(own, logits)
    # A code that takes its neighbour moves some logits far; another computation moves all.
    mean = float((logits - _row(results)).abs().mean())
    few = mean <= max(ALLOWED * found.largest, 3 * moved_mean)
    allowed = max(ALLOWED, 2 * moved / found.largest) if few and found.largest else ALLOWED
    said = (
        f"rounding of all floats to 2^-22 moves the graph's own logits by up to {moved:.3g}, by "
        f"{moved_mean:.3g} in the mean, and these are {mean:.3g} off in the mean"
    )
    return replace(found, allowed=allowed, cause=f"{found.cause}; {said}")


def _masked(gm: GraphModule) -> Callable[..., Tensor]:
    def call(input_ids: Tensor) -> Tensor:
        logits: Tensor = gm(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        return logits

    return call


def _run(kind: Kind, file: Path, probes: list[dict[str, Tensor]]) -> list[Tensor]:
    what = "inputs and logits of the check lie there"
    with temporary_folder(what, ExportError) as folder:
        given, found = folder / "given.pt", folder / "found.pt"
        with room_for(given, what, ExportError), held_errors(given) as start:
            torch.save(probes, start)
        threads = str(torch.get_num_threads())
        # -I leaves out PYTHONPATH and the user's packages, where torch may lie.
        folders = [each for each in sys.path if Path(each).is_absolute()]
        paths = (*map(str, (given, found)), *folders)
        command = [sys.executable, "-I", fresh_program.__file__, kind, str(file), threads, *paths]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BOUND)
        except subprocess.TimeoutExpired as error:
            raise _no_run(kind, file, f"it is not done in {_BOUND:.0f} s") from error
        if done.returncode < 0:
            raise _no_run(kind, file, f"it was ended by signal {-done.returncode}")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise _no_run(kind, file, printable(last[:300]))
        logits: list[Tensor] = torch.load(found, weights_only=True)
    return logits


def _no_run(kind: Kind, file: Path, reason: str) -> ExportError:
    return ExportError(
        f"{kind}: a fresh process cannot run {file.name}: {reason}; --no-check (check=False) "
        "leaves it out"
    )


def _codes_inputs(gm: GraphModule) -> bool:
    coded = (OPS.quantize.default, OPS.quantize_to.default)
    return any(node.target in coded for node in gm.graph.nodes)


def _sensitivity(gm: GraphModule, own: Tensor) -> tuple[float, float]:
    """How far noise of rounding's size in every float moves the logits ``own``, at most and in the
    mean, the largest over several draws: a code at the edge of two may take the other, and engines
    that sum in other orders differ by as much."""
    moved = [(own - _logits(_noisy(gm, seed))).abs() for seed in range(_SEEDS)]
    return max(float(each.max()) for each in moved), max(float(each.mean()) for each in moved)


def _logits(gm: GraphModule) -> Tensor:
    """Float32, of all random tokens, in one row."""
    call = _masked(gm)
    with torch.no_grad():
        return _row([call(ids) for ids in random_tokens(gm)])


def _row(logits: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.float().flatten() for each in logits])


def _noisy(gm: GraphModule, seed: int) -> GraphModule:
    """A copy whose floats, but those of codes, are off by some roundings."""
    generator = torch.Generator().manual_seed(seed)
    noisy = clone_sharing_storage(gm)
    for module in noisy.modules():
        if isinstance(module, QuantizedParameters):
            continue
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None and value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator) * _NOISE
                moved = (value.detach().float() * (1 + noise)).to(value.dtype)
                is_parameter = isinstance(value, torch.nn.Parameter)
                setattr(module, name, torch.nn.Parameter(moved, False) if is_parameter else moved)
    return noisy
