"""A text to evaluate and calibrate on, and the tokenizer that its protocol asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol as Interface

from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.errors import ModelError
from fxquant.evaluation.builtin_text import builtin_text
from fxquant.evaluation.protocol import PLAIN, Recipe
from fxquant.files.doors import as_path, read_text
from fxquant.frontends.hub import hub_is_reachable
from fxquant.frontends.pretrained import read_tokenizer, token_ids


class Documents(Interface):
    """A sequence of texts: a tuple, or a column of a dataset that is read as it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...

    def __iter__(self) -> Iterator[str]: ...


@dataclass(frozen=True)
class Source:
    """Documents to evaluate on and documents to calibrate on, with the protocol's recipe.

    ``calibration_documents`` None: both come from ``documents``, windows from its two ends.
    """

    name: str
    documents: Documents
    calibration_documents: Documents | None
    recipe: Recipe = PLAIN

    @property
    def evaluation(self) -> str:
        """The evaluated stream as text."""
        return self.recipe.join.join(head(self.documents, self.recipe.documents))

    @property
    def calibration(self) -> str | None:
        """The text to calibrate on, joined alike."""
        if self.calibration_documents is None:
            return None
        return self.recipe.join.join(self.calibration_documents)

    def draws_from(self, text: str) -> bool:
        """Whether ``text`` is what calibration windows come from."""
        if self.recipe.sampler == "documents":
            return False  # single documents out of millions: never joined
        mine = self.calibration
        return (self.evaluation if mine is None else mine) == text

    @cached_property
    def digest(self) -> str:
        """sha256 of the texts; of the evaluated one where calibration draws from millions, which
        have ``calibration_digest``."""
        calibration = None if self.recipe.sampler == "documents" else self.calibration
        both = f"{self.evaluation}\0{calibration or ''}"
        return f"sha256:{hashlib.sha256(both.encode()).hexdigest()}"

    @cached_property
    def calibration_digest(self) -> str | None:
        """sha256 of the documents that single ones are drawn from; None where ``digest`` has them.

        A clone's time stamps and a hub commit would tell copies of the same texts apart.
        """
        documents = self.calibration_documents
        if self.recipe.sampler != "documents" or documents is None:
            return None
        digest = hashlib.sha256()
        for document in documents:
            content = document.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
        return f"sha256:{digest.hexdigest()}"


def head(documents: Documents, count: int | None) -> Iterator[str]:
    """The first ``count`` documents, or all."""
    for index, document in enumerate(documents):
        if count is not None and index >= count:
            return
        yield document


def load_text(text: str) -> Source:
    """``builtin`` (English prose that CPython ships) or the path of a UTF-8 file."""
    if text == "builtin":
        recipe = Recipe(split="evaluation topics", calibration_split="calibration topics")
        parts = (builtin_text("evaluation"),), (builtin_text("calibration"),)
        return Source("builtin", *parts, recipe)
    path = as_path(text, "text")
    return Source(path.name, (read_text(path),), None)


def tokenizer_for(recipe: Recipe, tokenizer: Tokenizer, revision: str | None = None) -> Tokenizer:
    """The model's slow tokenizer where the recipe asks for it and the model has one.

    Read from where ``tokenizer`` was loaded, at the same ``revision`` of a hub model. Many models
    have only a fast one: then that is used; ``datasets.tokenizer_note`` says so from the protocol.
    """
    if recipe.tokenizer == "default" or not tokenizer.is_fast:
        return tokenizer
    place = tokenizer.name_or_path
    try:
        offline = Path(place).exists() or not hub_is_reachable()
        return read_tokenizer(place, revision, fast=False, offline=offline)
    except ModelError:
        return tokenizer


def tokens(text: str, tokenizer: Tokenizer) -> Tensor:
    """Ids int64 [T] of a text, with the special tokens that the tokenizer adds."""
    return token_ids(tokenizer, text)
