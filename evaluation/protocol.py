"""How text becomes scored tokens: what a dataset asks for, and the record of what was done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from fxquant.ir.counted import counted

Selection = Literal["all", "head", "samples"]
Sampler = Literal["grid", "offsets", "documents"]


@dataclass(frozen=True)
class Recipe:
    """What a dataset's protocol fixes.

    Attributes:
        split: the evaluated split, and ``calibration_split`` the one to calibrate on.
        join: string between documents; "" where each stands alone or there is only one.
        selection: "all" documents as one stream; the "head": the first ``documents`` as one stream,
            cut to ``most_windows`` windows; "samples": one window each from up to ``most_windows``
            documents drawn at random (GPTQ's get_c4, generator seeded with 0).
        tokenizer: "slow" where the papers used the Python tokenizer, else the model's default.
        sampler: of calibration windows: a "grid" without replacement; random "offsets" of the
            stream, or random "documents" (both as GPTQ's datautils.py draws them).
    """

    split: str = "whole text"
    calibration_split: str = "rest of the text"
    join: str = ""
    selection: Selection = "all"
    documents: int | None = None
    most_windows: int | None = None
    tokenizer: Literal["default", "slow"] = "default"
    sampler: Sampler = "grid"

    def select(self) -> str:
        """The selection in words."""
        if self.selection == "head":
            return f"the first {self.documents} documents, at most {self.most_windows} windows"
        if self.selection == "samples":
            return f"{self.most_windows} random documents (seed 0), a window of each"
        return "all documents"


PLAIN: Final = Recipe()


@dataclass(frozen=True)
class Protocol:
    """How one evaluation's windows were made: perplexities compare only where these are equal.

    ``windows`` rows of ``length`` tokens, ``stride`` apart; ``complete``: all that the text has.
    ``tokenizer``: kind and class; ``bos``: the token that the tokenizer put at the stream's head.
    """

    dataset: str
    split: str
    join: str
    selection: str
    tokenizer: str
    bos: str
    length: int
    stride: int
    windows: int
    complete: bool
    tail: str = "dropped"

    def line(self) -> str:
        """One line for under a table."""
        join = f" joined by {self.join!r}" if self.join else ""
        overlap = (
            "side by side"
            if self.stride == self.length
            else f"{self.stride} apart, only new tokens scored"
        )
        count = f"{'all' if self.complete else 'the first'} {counted(self.windows, 'window')}"
        if self.windows == 1:
            count = "the only window" if self.complete else "the first window"
        return (
            f"{self.dataset} ({self.split}: {self.selection}{join}); {self.tokenizer} tokenizer, "
            f"BOS: {self.bos}; {count} of {self.length} tokens, {overlap}, tail {self.tail}"
        )
