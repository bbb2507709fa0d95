"""Windows of tokens, cut once for every scheme: evaluation and calibration, never overlapping."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.errors import DataError
from fxquant.evaluation.overlap import check_drawn
from fxquant.evaluation.protocol import Protocol
from fxquant.evaluation.sampling import random_documents, random_offsets
from fxquant.evaluation.source import Source as Source
from fxquant.evaluation.source import load_text as load_text
from fxquant.evaluation.source import tokenizer_for, tokens
from fxquant.evaluation.stream import Cuts, Stream
from fxquant.evaluation.token_windows import Windows
from fxquant.ir.calibration import Origin
from fxquant.ir.counted import counted

# Tokens of calibration that are drawn at most, and the largest count that means anything.
MOST: Final = 2**30


def check_whole(name: str, value: object) -> None:
    """Raise DataError for what is no int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{name} must be a whole number, got {value!r}, a {type(value).__name__}")


def check_batch_size(size: int) -> None:
    """Raise DataError for a number of windows that cannot be run together."""
    check_whole("batch_size", size)
    if not 1 <= size <= MOST:
        raise DataError(f"batch size must be at least 1 and at most {MOST}, got {size}")


def check_seed(seed: int) -> None:
    """Raise DataError for a seed that torch's generators do not take as it is."""
    check_whole("seed", seed)
    if not 0 <= seed < 2**64:
        raise DataError(f"seed must be 0 to 2**64 - 1, got {seed}")


def check_counts(
    count: int | None,
    length: int,
    calibration: int,
    stride: int | None = None,
    what: str = "window",
) -> None:
    """Raise DataError for numbers of windows or tokens that make no evaluation.

    ``what``: which windows ``length`` is of.
    """
    check_whole("length" if what == "window" else "calibration_length", length)
    check_whole("calibration", calibration)
    for name, value in (("count", count), ("stride", stride)):
        check_whole(name, 1 if value is None else value)
    windows = f"all {what}s" if count is None else counted(count, what)
    asked = f"{windows} of {counted(length, 'token')} and {calibration} to calibrate on"
    if (count is not None and count < 1) or length < 2 or calibration < 0:
        raise DataError(
            f"need at least 1 window of 2 tokens and 0 calibration windows, got {asked}"
        )
    if max(count or 0, length, calibration) > MOST or calibration * length > MOST:
        raise DataError(f"more than {MOST} tokens are asked for: {asked}")
    if stride is not None and not 1 <= stride <= length:
        raise DataError(
            f"stride {stride} is not within 1..{length}, the window's length: a larger one would "
            "leave tokens unread"
        )


def cut_windows(
    source: Source,
    tokenizer: Tokenizer,
    *,
    count: int | None,
    length: int,
    calibration: int,
    seed: int,
    stride: int | None = None,
    calibration_length: int | None = None,
    calibration_source: Source | None = None,
    revision: str | None = None,
    allow_overlap: bool = False,
) -> Windows:
    """Cut once, for every scheme.

    Evaluation: the first ``count`` (None: all) windows of ``length`` tokens, ``stride`` apart
    (None: ``length``), of which only tokens that no earlier window held are scored. Calibration:
    ``calibration`` windows of ``calibration_length`` (None: ``length``), drawn by ``seed`` as the
    recipe says from ``calibration_source`` (None: the same source): from its calibration split, or
    from what the evaluation windows leave of a single text. ``revision``: of the hub model that the
    tokenizer is of, for protocols that ask for its slow one.

    Raises DataError when a text is too short, with the number of windows it has, and, but for
    ``allow_overlap``, where a text to calibrate on holds what is evaluated (``overlap``).
    """
    stride = length if stride is None else stride
    check_counts(count, length, calibration, stride)
    check_seed(seed)
    if calibration_length is not None:
        check_counts(1, calibration_length, calibration, what="calibration window")
    alone = calibration_source is None and source.calibration_documents is None
    if count is None and calibration and alone:
        raise DataError(
            f"all windows of {source.name} are asked for, which leaves none to calibrate on: "
            "ask for fewer, for 0 calibration windows, or name another calibration dataset"
        )
    reader = tokenizer_for(source.recipe, tokenizer, revision)
    cut = _evaluation(source, reader, count, length, stride)
    other = calibration_source or source
    other_reader = reader if other is source else tokenizer_for(other.recipe, tokenizer, revision)
    calibration_length = calibration_length or length
    rest = cut.rest if calibration_source is None else None
    drawn = _calibration(other, other_reader, calibration, calibration_length, seed, rest)
    scored = torch.full((len(cut.found.windows),), min(stride, length - 1))
    scored[0] = length - 1
    origin = None
    if calibration:
        origin = _origin(other, other_reader, drawn, calibration_length, seed, rest)
    windows = Windows(
        cut.found.windows,
        drawn.windows,
        scored,
        _protocol(source, reader, cut, length, stride),
        cut.found.spans,
        origin,
    )
    if not allow_overlap:
        check_drawn(windows)
    return windows


@dataclass(frozen=True)
class _Cut:
    """Evaluation windows, whether they are all there are, the first token, and what follows."""

    found: Cuts
    complete: bool
    first: int
    rest: Stream | None


def _evaluation(
    source: Source, tokenizer: Tokenizer, count: int | None, length: int, stride: int
) -> _Cut:
    most = source.recipe.most_windows
    if source.recipe.selection == "samples":
        return _samples(source, tokenizer, count, length, stride)
    stream = Stream.of(source.evaluation, tokenizer).head(None if most is None else most * length)
    available = max(0, (len(stream) - length) // stride + 1)
    wanted = max(available, 1) if count is None else count
    if wanted > available:
        raise DataError(
            f"{source.name} is too short: {_held(len(stream), available, length)}, but "
            f"{_asked(wanted)} for evaluation; ask for fewer or shorter windows"
        )
    found = stream.cut(range(0, wanted * stride, stride), length)
    rest = stream.behind((wanted - 1) * stride + length)
    return _Cut(found, wanted == available, int(stream.ids[0]), rest)


def _samples(
    source: Source, tokenizer: Tokenizer, count: int | None, length: int, stride: int
) -> _Cut:
    most = source.recipe.most_windows or 0
    wanted = most if count is None else count
    if stride != length:
        raise DataError(f"{source.name} is {most} separate samples: it takes no stride")
    if wanted > most:
        raise DataError(
            f"{source.name} has {counted(most, 'window')}, but {_asked(wanted)} for evaluation"
        )
    found = random_documents(source.documents, tokenizer, wanted, length, random.Random(0))
    first = int(tokens(source.documents[0], tokenizer)[0])
    return _Cut(found, wanted == most, first, None)


def _calibration(
    source: Source,
    tokenizer: Tokenizer,
    count: int,
    length: int,
    seed: int,
    rest: Stream | None,
) -> Cuts:
    """``rest``: what evaluation leaves of the source; None where another one is evaluated."""
    if count == 0:
        return Cuts.none(length)
    documents = source.calibration_documents
    if source.recipe.sampler == "documents" and documents is not None:
        return random_documents(documents, tokenizer, count, length, random.Random(seed))
    if source.calibration is not None:
        stream, what = Stream.of(source.calibration, tokenizer), "calibration text"
    elif rest is not None:
        stream, what = rest, "rest"
    else:
        stream, what = Stream.of(source.evaluation, tokenizer), "calibration text"
    if source.recipe.sampler == "offsets":
        return random_offsets(stream, count, length, random.Random(seed))
    available = len(stream) // length
    if count > available:
        raise DataError(
            f"the {what} of {source.name} has {counted(available, 'window')} of {length}, but "
            f"{_asked(count)} for; it is too short: ask for fewer or shorter windows"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return stream.cut([index * length for index in order[:count].tolist()], length)


def _held(tokens: int, windows: int, length: int) -> str:
    is_ = "is" if tokens == 1 else "are"
    return f"its {counted(tokens, 'token')} {is_} {counted(windows, 'window')} of {length}"


def _asked(count: int) -> str:
    return f"{count} {'is' if count == 1 else 'are'} asked"


def _origin(
    source: Source,
    tokenizer: Tokenizer,
    drawn: Cuts,
    length: int,
    seed: int,
    rest: Stream | None,
) -> Origin:
    whole = source.calibration_documents is None and rest is None
    return Origin(
        source=source.name,
        split=source.recipe.split if whole else source.recipe.calibration_split,
        join=source.recipe.join,
        sampler=source.recipe.sampler,
        tokenizer=_kind(tokenizer),
        text_hash=source.digest,
        length=length,
        seed=seed,
        spans=drawn.spans,
    )


def _kind(tokenizer: Tokenizer) -> str:
    return f"{'fast' if tokenizer.is_fast else 'slow'} {type(tokenizer).__name__}"


def _protocol(
    source: Source, tokenizer: Tokenizer, cut: _Cut, length: int, stride: int
) -> Protocol:
    recipe = source.recipe
    has_bos = cut.first == tokenizer.bos_token_id
    samples = recipe.selection == "samples"
    where = "at the head of each document" if samples else "once, at the head of the stream"
    return Protocol(
        dataset=source.name,
        split=recipe.split,
        join=recipe.join,
        selection=recipe.select(),
        tokenizer=_kind(tokenizer),
        bos=f"{tokenizer.bos_token} {where}" if has_bos else "none",
        length=length,
        stride=stride,
        windows=len(cut.found.windows),
        complete=cut.complete,
    )
