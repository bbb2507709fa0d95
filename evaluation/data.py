"""Text, cut once into windows of tokens: evaluation and calibration, never overlapping."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.errors import DataError
from fxquant.evaluation.builtin_text import builtin_text

WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")


@dataclass(frozen=True)
class Source:
    """Text to evaluate on and text to calibrate on.

    ``calibration`` None: both come from ``evaluation``, windows from its two ends.
    """

    name: str
    evaluation: str
    calibration: str | None

    @property
    def digest(self) -> str:
        both = f"{self.evaluation}\0{self.calibration or ''}"
        return f"sha256:{hashlib.sha256(both.encode()).hexdigest()}"


def load_text(text: str) -> Source:
    """``builtin`` (English prose that CPython ships) or the path of a UTF-8 file."""
    if text == "builtin":
        return Source("builtin", builtin_text("evaluation"), builtin_text("calibration"))
    path = Path(text)
    try:
        return Source(path.name, path.read_text(encoding="utf-8"), None)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read text {text!r} as UTF-8: {error}") from error


def load_dataset_text(name: str) -> Source:
    """``wikitext2``: raw v1, test split to evaluate, train split to calibrate, joined by blank
    lines as GPTQ does (Frantar et al. 2023, datautils.py)."""
    if name != "wikitext2":
        raise DataError(f"unknown dataset {name!r}: known is wikitext2; or give --text FILE")
    import datasets

    try:
        parts = [
            "\n\n".join(datasets.load_dataset(*WIKITEXT, split=split)["text"])
            for split in ("test", "train")
        ]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot load {'/'.join(WIKITEXT)}: {str(error).splitlines()[0]} (it needs the network "
            "or a filled cache of datasets; --text FILE takes any local text)"
        ) from error
    return Source(name, parts[0], parts[1])


@dataclass(frozen=True)
class Windows:
    """Token windows int64: evaluation [N, L] and calibration [M, L]; M may be 0."""

    evaluation: Tensor
    calibration: Tensor


def check_counts(count: int, length: int, calibration: int) -> None:
    """Raise DataError for numbers of windows or tokens that make no evaluation."""
    if count < 1 or length < 2 or calibration < 0:
        raise DataError(
            f"need at least 1 window of 2 tokens and 0 calibration windows, got {count} windows "
            f"of {length} and {calibration}"
        )


def cut_windows(
    source: Source, tokenizer: Tokenizer, *, count: int, length: int, calibration: int, seed: int
) -> Windows:
    """Cut once, for every scheme.

    Evaluation: the first ``count`` consecutive windows of ``length`` tokens. Calibration:
    ``calibration`` windows drawn without replacement by ``seed`` from the calibration text, or
    from what the evaluation windows leave of a single text. Raises DataError when a text is too
    short, with the number of windows it has.
    """
    check_counts(count, length, calibration)
    stream = _tokens(source.evaluation, tokenizer)
    evaluation = _grid(stream, length)
    available = len(evaluation)
    if source.calibration is None:
        rest = evaluation[count:]
        needed, what = count + calibration, "evaluation and calibration"
    else:
        rest = _grid(_tokens(source.calibration, tokenizer), length)
        needed, what = count, "evaluation"
    if needed > available:
        raise DataError(
            f"text {source.name} is too short: its {len(stream)} tokens are {available} windows of "
            f"{length}, but {needed} are asked for {what}; ask for fewer or shorter windows"
        )
    if calibration > len(rest):
        raise DataError(
            f"the calibration text of {source.name} has {len(rest)} windows of {length}, but "
            f"{calibration} are asked for; ask for fewer or shorter windows"
        )
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
    return Windows(evaluation[:count].clone(), rest[order[:calibration]].clone())


def _tokens(text: str, tokenizer: Tokenizer) -> Tensor:
    # verbose=False: the warning about sequences longer than the model does not apply to a stream.
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    assert isinstance(ids, Tensor)
    return ids


def _grid(stream: Tensor, length: int) -> Tensor:
    count = len(stream) // length
    return stream[: count * length].view(count, length)
