"""Windows of tokens: what a text was cut into, and how."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from torch import Tensor

from fxquant.evaluation.protocol import Protocol
from fxquant.ir.calibration import Origin, Spans
from fxquant.pipeline.recording import DrawnBatches


@dataclass(frozen=True)
class Windows:
    """Token windows int64: evaluation [N, L] and calibration [M, L']; M may be 0.

    ``scored`` int64 [N]: how many of each evaluation window's last tokens count. ``places``: where
    the evaluation windows lie; ``origin``: how the calibration windows were drawn, if any were.
    """

    evaluation: Tensor
    calibration: Tensor
    scored: Tensor
    protocol: Protocol
    places: Spans = field(default_factory=Spans)
    origin: Origin | None = None

    def __str__(self) -> str:
        """How much there is, from where and how it was cut, and what to do with it."""
        lines = [
            f"evaluation: {self.protocol.line()}; token ids int64 {list(self.evaluation.shape)}",
            "calibration: none",
            "evaluate(model, windows) evaluates",
        ]
        if self.origin is not None:
            words = f"{self.origin.words(len(self.calibration))}, seed {self.origin.seed}"
            lines[1] = f"calibration: {words}; token ids int64 {list(self.calibration.shape)}"
            lines[2] = f"convert(model, scheme, calibration=windows.batches), then {lines[2]}"
        return "\n".join(lines)

    __repr__ = __str__

    @property
    def batches(self) -> DrawnBatches | None:
        """The calibration windows, a batch each, for ``convert``; None where there are none."""
        if self.origin is None:
            return None
        return DrawnBatches(self.calibration.split(1), self.origin)

    @property
    def digest(self) -> str:
        """sha256 of the evaluation windows' token ids themselves."""
        shape, ids = f"{list(self.evaluation.shape)}", self.evaluation.contiguous()
        digest = hashlib.sha256(shape.encode() + ids.numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"
