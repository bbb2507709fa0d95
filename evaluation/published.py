"""Published figures, as data with their sources, to stand beside ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from fxquant.evaluation.fingerprint import depends_on_seed
from fxquant.schemes.scheme import Scheme

OPT: Final = {
    "opt-125m": "opt 12x768",
    "opt-350m": "opt 24x1024",
    "opt-1.3b": "opt 24x2048",
    "opt-2.7b": "opt 32x2560",
    "opt-6.7b": "opt 32x4096",
    "opt-13b": "opt 40x5120",
    "opt-175b": "opt 96x12288",
}
# Of one shape with others: a figure is theirs only where the model's name holds this one.
NAMED_MODELS: Final = {
    "llama-2-7b": "llama 32x4096",
    "qwen1.5-0.5b": "qwen2 24x1024",
}
LENGTH: Final = 2048
"""Tokens a window, side by side, in every published perplexity."""


@dataclass(frozen=True)
class Calibration:
    """What a published figure was calibrated on, in words.

    ``drawn``: how Provenance begins to describe the same windows here; () where none are the same.
    """

    words: str
    drawn: tuple[str, ...] = ()

    def is_that_of(self, provenance_calibration: str) -> bool:
        return provenance_calibration.startswith(self.drawn)


_C4_WINDOWS: Final = Calibration(
    "128 windows of 2048 tokens of C4",
    tuple(f"128 windows of 2048 from {name} (" for name in ("c4-old", "c4-new")),
)
_PILE_WINDOWS: Final = Calibration("512 windows of 512 tokens of the Pile")
_UNNAMED: Final = Calibration("text that is not named")
# A table that quotes a method may have calibrated it otherwise than the method's authors.
_UNRECORDED: Final = Calibration("what is not recorded here")


@dataclass(frozen=True)
class Published:
    """One published figure.

    ``architecture``: as in Provenance. ``dataset``: the protocol's name here; None where the text
    is not named, so that only ``delta_loss`` compares. ``scheme``: ours that does the same; None
    where there is none. ``calibration``: None where ``scheme`` depends on none. ``named``: what the
    model's name has to hold, lower case, where other models have its architecture.
    """

    architecture: str
    dataset: str | None
    method: str
    scheme: str | None
    source: str
    perplexity: float | None = None
    delta_loss: float | None = None
    calibration: Calibration | None = None
    named: str = ""


_GPTQ = "GPTQ table 3"
_OMNI = "OmniQuant table A20"
_SIZES = ("opt-125m", "opt-350m", "opt-1.3b", "opt-2.7b", "opt-6.7b")
# Our own defaults search scales, feed each layer what the ones before it in its block make of its
# input (gptq), and weigh a block's outputs evenly (awq): here stands what the papers do.
GPTQ_OF_THE_PAPER: Final = "+gptq(within=block,grid=minmax)"
AWQ_OF_THE_PAPER: Final = "+awq(balanced=false)"
# Round-to-nearest of the papers is asymmetric min-max. One perplexity a size, None where not given.
_WIKITEXT2: Final = (
    ("FP16", "fp", (27.65, 22.00, 14.63, 12.47, 10.86), _GPTQ),
    ("RTN W8 per row", "w8-asym", (27.66, None, 14.678, None, None), "a public reproduction"),
    ("RTN W4 per row", "w4-asym", (37.28, 25.94, 48.17, 16.92, 12.10), _GPTQ),
    ("GPTQ W4 per row", f"w4-asym{GPTQ_OF_THE_PAPER}", (31.12, 24.24, 15.47, 12.87, 11.39), _GPTQ),
    ("AWQ W4 per row", f"w4-asym{AWQ_OF_THE_PAPER}", (32.28, None, 15.49, 12.93, 11.30), _OMNI),
    ("OmniQuant W4 per row", None, (29.45, None, 15.04, 12.76, 11.03), _OMNI),
    ("RTN W4 g128", "w4-g128-asym", (30.47, None, 15.29, 13.02, 11.15), _OMNI),
    ("GPTQ W4 g128", f"w4-g128-asym{GPTQ_OF_THE_PAPER}", (29.81, None, 14.89, 12.52, 10.93), _OMNI),
    ("AWQ W4 g128", f"w4-g128-asym{AWQ_OF_THE_PAPER}", (29.15, None, 14.94, 12.74, 10.93), _OMNI),
    ("OmniQuant W4 g128", None, (28.86, None, 14.88, 12.65, 10.96), _OMNI),
    ("RTN W3 per row", "w3-asym", (1.3e3, 64.57, 1.3e4, 1.6e4, 5.8e3), _GPTQ),
    ("GPTQ W3 per row", f"w3-asym{GPTQ_OF_THE_PAPER}", (53.85, 33.79, 20.97, 16.88, 14.86), _GPTQ),
    ("GPTQ W3 g128", f"w3-g128-asym{GPTQ_OF_THE_PAPER}", (39.24, None, 16.47, 13.69, 11.65), _OMNI),
    ("AWQ W3 g128", f"w3-g128-asym{AWQ_OF_THE_PAPER}", (36.74, None, 16.32, 13.58, 11.41), _OMNI),
)


def _calibrated(scheme: str | None, calibration: Calibration) -> Calibration | None:
    depends = scheme is not None and depends_on_seed(Scheme.parse(scheme))
    return calibration if depends else None


def _wikitext2() -> Iterator[Published]:
    for method, scheme, values, source in _WIKITEXT2:
        drawn = _C4_WINDOWS if source == _GPTQ else _UNRECORDED
        calibration = _calibrated(scheme, drawn)
        for size, value in zip(_SIZES, values, strict=True):
            if value is not None:
                place = (OPT[size], "wikitext2", method, scheme, source)
                yield Published(*place, value, calibration=calibration)


GPTQ_TABLE: Final = (
    *_wikitext2(),
    Published(OPT["opt-1.3b"], "c4-old", "FP16", "fp", "GPTQ, old protocol", 14.72),
    Published(OPT["opt-1.3b"], "ptb-old", "FP16", "fp", "GPTQ, old protocol", 16.96),
    Published(OPT["opt-1.3b"], "c4-new", "FP16", "fp", "GPTQ, --new-eval", 16.07),
    Published(OPT["opt-1.3b"], "ptb-new", "FP16", "fp", "GPTQ, --new-eval", 20.29),
)

_SMOOTH = "+smooth(alpha=0.5)"
_CUSHION = "CushionCache table 1"
_SMOOTHQUANT = "SmoothQuant table 3"
SMOOTH_LEVELS: Final = {
    "O1": f"w8-tensor/a8-dynamic-token{_SMOOTH}",
    "O2": f"w8-tensor/a8-dynamic{_SMOOTH}",
    "O3": f"w8-tensor/a8-static:absmax{_SMOOTH}",
}
_W8A8: Final = (
    ("FP16", "fp", 10.86),
    ("W8A8 static per tensor", "w8a8-static:absmax", 11.45),
    ("W8A8 dynamic per tensor", "w8a8-dynamic", 11.73),
    ("W8A8 dynamic per token", "w8a8-dynamic-token", 11.20),
    ("SmoothQuant O3", SMOOTH_LEVELS["O3"], 10.85),
    ("SmoothQuant O2", SMOOTH_LEVELS["O2"], 10.87),
    ("SmoothQuant O1", SMOOTH_LEVELS["O1"], 10.86),
)
# SmoothQuant's own WikiText figure at 175B is under another protocol than GPTQ's (8.34).
_OWN = "wikitext of SmoothQuant table 3"
_W8A8_175B: Final = (
    ("FP16", "fp", 10.99),
    ("W8A8", None, 93080.0),
    ("SmoothQuant O1", SMOOTH_LEVELS["O1"], 11.11),
    ("SmoothQuant O2", SMOOTH_LEVELS["O2"], 11.14),
    ("SmoothQuant O3", SMOOTH_LEVELS["O3"], 11.17),
)


SMOOTHQUANT_TABLE: Final = tuple(
    Published(OPT[size], dataset, m, s, source, p, calibration=_calibrated(s, calibration))
    for size, dataset, source, calibration, rows in (
        ("opt-6.7b", "wikitext2", _CUSHION, _UNRECORDED, _W8A8),
        ("opt-175b", _OWN, _SMOOTHQUANT, _PILE_WINDOWS, _W8A8_175B),
    )
    for m, s, p in rows
)

# One perplexity a method.
_QUARK: Final = (
    ("FP16", "fp"),
    ("FP8 W8A8 per tensor", "we4m3-tensor/ae4m3-static:absmax"),
    ("INT8 W8A8 per tensor", "w8-tensor/a8-static:absmax"),
)
_PER_TENSOR: Final = (
    ("opt-125m", (27.65, 28.11, 30.18)),
    ("opt-13b", (10.12, 10.24, 4135.99)),
    ("llama-2-7b", (5.47, 5.54, 19.09)),
    ("qwen1.5-0.5b", (14.8, 15.57, 40.29)),
)


def _formats() -> Iterator[Published]:
    for model, values in _PER_TENSOR:
        named = model if model in NAMED_MODELS else ""
        for (method, scheme), value in zip(_QUARK, values, strict=True):
            yield Published(
                *(
                    {**OPT, **NAMED_MODELS}[model],
                    "wikitext2",
                    method,
                    scheme,
                    "Quark's documentation",
                ),
                value,
                calibration=_calibrated(scheme, _UNRECORDED),
                named=named,
            )


FORMATS_TABLE: Final = tuple(_formats())

_TARGET = "reference measurement, text not named"
REFERENCE_LOSS: Final = 3.323711
# Losses rather than differences, as they were given.
_LADDER: Final = (
    ("FP16", "fp", REFERENCE_LOSS, 27.763178),
    ("FP32 GEMM", "fp32-gemm", 3.323700, 27.762894),
    ("W8", "w8", 3.322239, None),
    ("W8A8 dynamic per tensor", "w8a8-dynamic", 3.422797, None),
    ("W8A8 static p99.9", "w8a8-static", 6.391982, None),
)
LADDER: Final = tuple(
    Published(
        OPT["opt-1.3b"],
        None,
        method,
        scheme,
        _TARGET,
        perplexity,
        loss - REFERENCE_LOSS,
        _calibrated(scheme, _UNNAMED),
    )
    for method, scheme, loss, perplexity in _LADDER
)

ALL: Final = (*GPTQ_TABLE, *SMOOTHQUANT_TABLE, *FORMATS_TABLE, *LADDER)
