"""What made the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from fxquant.evaluation.decoding import decode
from fxquant.evaluation.protocol import Protocol
from fxquant.ir.calibration import (
    NOTHING,
    CalibrationRecord,
    calibration_words,
    folded,
    version_words,
)
from fxquant.ir.counted import counted


@dataclass(frozen=True)
class Provenance:
    """What made the numbers: enough to make them again.

    ``architecture``: kind and shape, such as "opt 24x2048". ``calibration``: how its windows were
    drawn, for all rows together, each of which has its own record. ``windows_hash``: of the
    evaluated token ids themselves. ``seed`` drew the calibration windows; None where none was, or
    several, or it is not known. ``weights``: what the float weights were before, where they have
    been coarser. ``level``: that the schemes were lowered to, "" where older results do not say.
    ``engine``: what ran exported models, and how, "" where graphs ran alone.
    """

    model: str
    revision: str
    architecture: str
    dataset: str
    text_hash: str
    windows_hash: str
    protocol: Protocol
    windows: int
    length: int
    calibration: str
    calibration_windows: int | None
    batch_size: int
    dtype: str
    device: str
    seed: int | None
    threads: int
    versions: dict[str, str]
    command: str
    processes: int = 1
    weights: str = ""
    engine: str = ""
    level: str = ""

    def calibrated(
        self, found: Sequence[CalibrationRecord] | None, only: Sequence[str] = ()
    ) -> Provenance:
        """With what graphs were calibrated on, and the seed that drew it, if it is one for all;
        ``only``: the schemes of which that is said."""
        words = calibration_words(None if found is None else tuple(found))
        records = folded(found or ())
        windows = None if found is None else sum(each.windows for each in records)
        seeds = {None if each.origin is None else each.origin.seed for each in records}
        said = f"{words} for {', '.join(only)}" if only else words
        return replace(
            self,
            calibration=said,
            calibration_windows=windows,
            seed=seeds.pop() if len(seeds) == 1 else None,
        )

    def identity(self) -> str:
        """The model's revision, and its weights where they have been coarser."""
        weights = f"; weights {self.weights}" if self.weights else ""
        return f"{self.revision[:23]}{weights}"

    def seed_words(self) -> str:
        if self.seed is not None:
            return f"seed {self.seed}"
        if self.calibration == NOTHING:
            return "no seed"
        return "seed unknown" if "unknown" in self.calibration else "several seeds"

    def setting(self) -> str:
        """Batch size, dtype, device and level, as lines say them."""
        level = f" at level {self.level}" if self.level else ""
        return f"batch size {self.batch_size}, {self.dtype} on {self.device}{level}"

    def line(self) -> str:
        """One line for under a table."""
        versions = version_words(self.versions)
        processes = f", {self.processes} processes" if self.processes > 1 else ""
        engine = f"; exported to {self.engine}" if self.engine else ""
        return (
            f"{self.model} ({self.identity()}), {self.protocol.line()} "
            f"(text {self.text_hash[:23]}), calibrated on {self.calibration}, "
            f"{self.setting()} "
            f"({counted(self.threads, 'thread')}{processes}), {self.seed_words()}; {versions}"
            f"{engine}"
        )

    @classmethod
    def from_json(cls, data: object, where: str = "") -> Provenance:
        """From ``dataclasses.asdict``. Raises ValueError that names the field of other data."""
        return decode(cls, data, where)


def architecture(config: PretrainedConfig) -> str:
    """Kind and shape, such as "opt 24x2048": what published figures are looked up by."""
    return f"{config.model_type} {config.num_hidden_layers}x{config.hidden_size}"
