"""Tokens that know where they lie: a text's ids, and windows that are cut out of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.evaluation.source import tokens
from fxquant.ir.calibration import Spans, Text


@dataclass(frozen=True)
class Cuts:
    """Windows int64 [N, L] and where each lies."""

    windows: Tensor
    spans: Spans

    @classmethod
    def none(cls, length: int) -> Cuts:
        return cls(torch.empty(0, length, dtype=torch.int64), Spans())

    @classmethod
    def together(cls, parts: Sequence[Cuts]) -> Cuts:
        """The windows of all parts, of each its own texts."""
        texts = [text for part in parts for text in part.spans.texts]
        spans = []
        before = 0
        for part in parts:
            spans += [(text + before, first, end) for text, first, end in part.spans.spans]
            before += len(part.spans.texts)
        return cls(torch.cat([part.windows for part in parts]), Spans(tuple(texts), tuple(spans)))


@dataclass(frozen=True)
class Stream:
    """Ids int64 [T] of ``text`` from its token ``start`` on."""

    ids: Tensor
    text: Text
    start: int = 0

    @classmethod
    def of(cls, text: str, tokenizer: Tokenizer) -> Stream:
        return cls.known(text, tokens(text, tokenizer))

    @classmethod
    def known(cls, text: str, ids: Tensor) -> Stream:
        """Of a text whose ids are there."""
        hashes = (hashlib.sha256(each) for each in (text.encode(), ids.numpy().tobytes()))
        return cls(ids, Text(*(f"sha256:{each.hexdigest()}" for each in hashes)))

    def __len__(self) -> int:
        return len(self.ids)

    def behind(self, first: int) -> Stream:
        """What is left from token ``first`` of this stream on."""
        return Stream(self.ids[first:], self.text, self.start + first)

    def head(self, count: int | None) -> Stream:
        """Its first ``count`` tokens; all for None."""
        return Stream(self.ids[:count], self.text, self.start)

    def cut(self, starts: Sequence[int], length: int) -> Cuts:
        """A window of ``length`` at each of ``starts``, at least one."""
        windows = torch.stack([self.ids[start : start + length] for start in starts])
        places = (start + self.start for start in starts)
        return Cuts(windows, Spans((self.text,), tuple((0, at, at + length) for at in places)))
