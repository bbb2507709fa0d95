"""What made the numbers."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from fxquant.evaluation.decoding import decode
from fxquant.evaluation.protocol import Protocol


@dataclass(frozen=True)
class Provenance:
    """What made the numbers: enough to make them again.

    ``architecture``: kind and shape, such as "opt 24x2048". ``calibration``: how its windows were
    drawn. ``windows_hash``: of the token ids themselves, evaluation and calibration.
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
    calibration_windows: int
    batch_size: int
    dtype: str
    device: str
    seed: int
    threads: int
    versions: dict[str, str]
    command: str
    processes: int = 1

    def line(self) -> str:
        """One line for under a table."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        processes = f", {self.processes} processes" if self.processes > 1 else ""
        return (
            f"{self.model} ({self.revision[:23]}), {self.protocol.line()} "
            f"({self.text_hash[:23]}), calibrated on {self.calibration}, "
            f"batch size {self.batch_size}, {self.dtype} on {self.device} "
            f"({self.threads} threads{processes}), seed {self.seed}; {versions}"
        )

    @classmethod
    def from_json(cls, data: object, where: str = "") -> Provenance:
        """From ``dataclasses.asdict``. Raises ValueError that names the field of other data."""
        return decode(cls, data, where)


def architecture(config: PretrainedConfig) -> str:
    """Kind and shape, such as "opt 24x2048": what published figures are looked up by."""
    return f"{config.model_type} {config.num_hidden_layers}x{config.hidden_size}"
