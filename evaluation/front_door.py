"""The library's way in from Python: a text cut into windows, the loss of a graph on them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.analysis.inputs import token_windows
from fxquant.errors import DataError
from fxquant.evaluation import perplexity
from fxquant.evaluation.data import check_batch_size, cut_windows
from fxquant.evaluation.datasets import check_dataset, looks_like_a_path, open_source
from fxquant.evaluation.models import versions
from fxquant.evaluation.overlap import calibrated_windows
from fxquant.evaluation.protocol import Recipe
from fxquant.evaluation.source import Source
from fxquant.evaluation.statistics import Difference, WindowSums, paired_difference
from fxquant.evaluation.subject import subject_of
from fxquant.evaluation.token_windows import Windows
from fxquant.files.doors import Location, as_path, check_text, location
from fxquant.ir.calibrated_rows import can_tell, seen_rows
from fxquant.ir.calibration import UNKNOWN, Spans, calibration_words, version_words
from fxquant.ir.counted import counted, part_of
from fxquant.ir.graph import GraphInfo
from fxquant.pipeline.arguments import checked_call
from fxquant.pipeline.recording import DrawnBatches
from fxquant.recipes.running import AUTO
from fxquant.run.batches import Batch, check_ids
from fxquant.run.encodings import is_text
from fxquant.schemes.scheme import brief

Text = Location | Iterable[str]


@checked_call(
    *("count", "length", "calibration", "seed", "stride", "calibration_length"),
    windows="count",
    num_windows="count",
    n="count",
    calibration_windows="calibration",
    seqlen="length",
    max_length="length",
    dataset="text",
)
def windows(
    text: Text,
    tokenizer: Tokenizer,
    *,
    count: int | None = 8,
    length: int = 512,
    calibration: int = 16,
    seed: int = 0,
    stride: int | None = None,
    calibration_length: int | None = None,
    data: Location | None = None,
) -> Windows:
    """Cut a text into token windows, as ``fxquant evaluate`` does with the same numbers.

    Args:
        text: ``builtin``, a named dataset (docs/evaluation.md), the path of a text file, a parquet
            file or a folder of save_to_disk; the text itself, if it holds white space and is no
            file's name; or several documents, joined by an empty line.
        tokenizer: the model's.
        count: windows to evaluate on, the text's first ones; None: all.
        length: tokens of a window.
        calibration: windows to calibrate on, drawn by ``seed`` from the text's calibration split,
            or from what the evaluation windows leave of it.
        stride: tokens from window to window; only new tokens are scored (None: ``length``).
        calibration_length: tokens of a calibration window (None: ``length``).
        data: a folder with clones of hub datasets.

    Returns ``evaluation`` int64 [count, length] and ``calibration`` int64 [calibration, length],
    which share no token, with the protocol they were cut by. Raises DataError: a text that is
    missing or too short.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise DataError(
            f"a {type(tokenizer).__name__} is no tokenizer: pass "
            "fxquant.load_model(name).tokenizer or what AutoTokenizer.from_pretrained returns"
        )
    return cut_windows(
        _source(text, None if data is None else as_path(data, "data")),
        tokenizer,
        count=count,
        length=length,
        calibration=calibration,
        seed=seed,
        stride=stride,
        calibration_length=calibration_length,
    )


def _source(text: Text, data: Path | None) -> Source:
    if isinstance(text, os.PathLike):
        return open_source(location(text, "text"), data)
    if isinstance(text, str):
        if not text.strip():
            raise DataError("the text is empty")
        check_text(text, "the text")
        return Source(_shown(text), (text,), None) if _is_prose(text) else open_source(text, data)
    listed = isinstance(text, Iterable) and not isinstance(text, Mapping)
    listed = listed and getattr(text, "ndim", 1) > 0
    documents = tuple(text) if listed else ()
    if not documents or not all(isinstance(document, str) for document in documents):
        raise DataError(
            f"a text is a string, a path or a list of strings, not a {type(text).__name__}"
            + (f" of {type(documents[0]).__name__}" if documents else "")
        )
    for index, document in enumerate(documents):
        check_text(document, f"document {index} of the text")
    return Source(counted(len(documents), "document"), documents, None, Recipe(join="\n\n"))


def _is_prose(text: str) -> bool:
    """Whether a string is a text itself, not the name of one."""
    if len(text.split()) < 2 or looks_like_a_path(text):
        return False
    try:
        check_dataset(text)
    except DataError:
        return True
    return False


def _shown(text: str) -> str:
    return f"the text {text!r}" if len(text) <= 40 else f"a text of {len(text)} characters"


@dataclass(frozen=True)
class Evaluation:
    """The loss of one graph on windows of text. ``result - base`` is Δloss with its standard error.

    ``loss`` nats a token over all scored tokens, ``error`` its standard error with windows as
    clusters (None for one window), ``share_clipped`` the fraction of quantized activation elements
    whose code was clipped (None: none are quantized), ``digest`` sha256 of the windows' token ids,
    ``overlap`` the number of windows that the graph was calibrated on (None: that was not checked,
    since nothing says what it read, or windows are too short to tell them by their tokens),
    ``calibration``: what it was calibrated on, ``weights``: what the float weights were before,
    where they have been coarser, ``level``: of the graph that was run, "" in an engine, ``engine``:
    what ran the exported model, "" for the graph itself.
    """

    model: str
    scheme: str
    sums: WindowSums = field(repr=False)
    share_clipped: float | None
    seconds: float
    text: str
    digest: str
    setting: str
    overlap: int | None = 0
    calibration: str = UNKNOWN
    weights: str = ""
    level: str = ""
    engine: str = ""

    @property
    def loss(self) -> float:
        return self.sums.loss

    @property
    def perplexity(self) -> float:
        return perplexity.from_loss(self.loss)

    @property
    def error(self) -> float | None:
        zero = WindowSums((0.0,) * self.windows, self.sums.tokens)
        return paired_difference(self.sums, zero).error

    @property
    def windows(self) -> int:
        return len(self.sums.tokens)

    @property
    def tokens(self) -> int:
        """How many were scored."""
        return sum(self.sums.tokens)

    def __sub__(self, base: Evaluation) -> Difference:
        """Δloss against ``base`` and its standard error by paired differences.

        Raises DataError where the two did not score the same tokens.
        """
        if not isinstance(base, Evaluation):
            return NotImplemented
        if self.digest != base.digest:
            raise DataError(
                f"a difference needs the same windows: {self.scheme} was evaluated on {self.text} "
                f"({self.digest[:23]}), {base.scheme} on {base.text} ({base.digest[:23]})"
            )
        return paired_difference(self.sums, base.sums)

    def __str__(self) -> str:
        error = "n/a" if self.error is None else f"{self.error:.4f}"
        seen = f", {self.overlap} of them calibrated on" if self.overlap else ""
        if self.overlap is None:
            seen = ", overlap with the calibration not checked"
        clipped = "" if self.share_clipped is None else f", clipped {self.share_clipped:.4%}"
        weights = f" (weights {self.weights})" if self.weights else ""
        engine = f" in {self.engine}" if self.engine else ""
        return (
            f"{brief(self.scheme)}{engine}: loss {self.loss:.4f} ± {error}, perplexity "
            f"{self.perplexity:.5g}{clipped}; "
            f"{counted(self.tokens, 'token')} scored in {counted(self.windows, 'window')}{seen}\n"
            f"{self.model}{weights}, {self.text} (token ids {self.digest[:23]}), calibrated on "
            f"{self.calibration}, {self.setting}"
        )


@checked_call("batch_size", windows="data", text="data", dataset="data", calibration="data")
def evaluate(
    model: PreTrainedModel | GraphModule | Location,
    data: Windows | Text | Batch | Iterable[Batch],
    tokenizer: Tokenizer | None = None,
    *,
    batch_size: int = 1,
    allow_overlap: bool = False,
    level: str = AUTO,
    runtime: str | None = None,
) -> Evaluation:
    """Loss and perplexity of a model on text, with the figures of ``fxquant evaluate``.

    Args:
        model: a Hugging Face causal LM (it is traced), or a graph of trace, convert or load; with
            ``runtime`` also the folder of an export.
        data: what ``windows`` returns; a text, which ``windows`` cuts with its defaults and
            ``tokenizer``; or token ids [N, L] (what a tokenizer returns too, without padding), of
            which all but each row's first are scored.
        batch_size: windows run together; dynamic per-tensor ranges depend on it.
        allow_overlap: score windows that the graph was calibrated on; the result says how many.
        level: to lower a quantized graph to; "auto": an integer graph on CUDA to kernels, which are
            the same bits, any other stays as it is. "kernels-inexact" has to be asked for.
        runtime: "onnxruntime", "transformers" or "vllm": export the graph, and score what that
            engine computes; what its format fixes on data (``nvfp4``) is read from the calibration
            windows of ``data``.

    Raises DataError (no windows, windows that the graph was calibrated on, ids of another
    vocabulary, a text without a tokenizer, an observed graph, which would count what it is
    evaluated on) before any work, NonFiniteError where the model overflows, what ``trace`` raises.
    """
    check_batch_size(batch_size)
    cut = _cut(data, tokenizer)
    drawn = cut.batches if isinstance(cut, Windows) else None
    subject = subject_of(model, runtime, level, drawn)
    facts = subject.facts
    scored, text = None, "token ids as given"
    if isinstance(cut, Windows):
        ids, scored, text = cut.evaluation, cut.scored, cut.protocol.line()
    else:
        ids = _stacked(token_windows(cut, facts))
    check_ids(ids, facts, "evaluation windows")
    overlap = _overlap(facts, cut, ids, allow_overlap)
    found, read = subject.run(ids, batch_size, scored)
    return Evaluation(
        model=facts.model,
        scheme=facts.scheme,
        sums=found.sums,
        share_clipped=found.share_clipped,
        seconds=found.seconds,
        text=text,
        digest=_digest(ids, found.sums.tokens),
        setting=f"{subject.setting(batch_size)}; {version_words(versions())}",
        level=subject.level,
        overlap=overlap,
        calibration=calibration_words(read),
        weights=facts.weights,
        engine=subject.engine,
    )


def _overlap(facts: GraphInfo, cut: Any, ids: Tensor, allowed: bool) -> int | None:
    """How many of the windows ``ids`` the graph was calibrated on; None where nothing tells."""
    rows, made = tuple(ids), facts.calibration
    places = cut.origin.spans if isinstance(cut, DrawnBatches) else Spans()
    if isinstance(cut, Windows):
        places, shared = cut.places, calibrated_windows(made, cut)
    else:
        shared = seen_rows(made, rows, places)
    if shared and not allowed:
        where = f" of {cut.protocol.dataset}" if isinstance(cut, Windows) else ""
        raise DataError(
            f"{part_of(len(shared), len(rows), f'window{where}', f'windows{where}')} "
            f"what the graph was calibrated on, {calibration_words(made)}: their loss "
            "would not be of unseen text; cut one Windows and take its .batches to calibrate and "
            "itself to evaluate, or pass allow_overlap=True, which the result says"
        )
    return len(shared) if shared or can_tell(made, rows, places) else None


def _cut(data: Any, tokenizer: Tokenizer | None) -> Any:
    """Windows where ``data`` is a text or Windows; else as it is, for ``as_windows`` to check."""
    if not (is_text(data) or isinstance(data, os.PathLike)):
        return data
    if tokenizer is None:
        raise DataError("a text needs the model's tokenizer: evaluate(model, text, tokenizer)")
    return windows(data, tokenizer, calibration=0)


def _stacked(parts: tuple[Tensor, ...]) -> Tensor:
    lengths = sorted({part.shape[1] for part in parts})
    if len(lengths) > 1:
        raise DataError(
            f"windows of {lengths[0]} to {lengths[-1]} tokens: fxquant.windows cuts a text into "
            "windows of one length"
        )
    return torch.cat(parts).cpu()


def _digest(ids: Tensor, scored: tuple[int, ...]) -> str:
    content = f"{list(ids.shape)} {scored}".encode() + ids.cpu().contiguous().numpy().tobytes()
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
