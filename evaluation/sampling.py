"""Random windows as GPTQ draws them (Frantar et al. 2023, datautils.py), call for call."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.errors import DataError
from fxquant.evaluation.source import Documents

Tokenize = Callable[[str], Tensor]

# A text whose documents are all short would be searched for ever.
_MISSES = 100_000


def random_offsets(stream: Tensor, count: int, length: int, draw: random.Random) -> Tensor:
    """``count`` windows [count, length] at random offsets of a stream; they may overlap.

    Raises DataError when the stream has no more than ``length`` tokens.
    """
    if len(stream) <= length:
        raise DataError(f"a stream of {len(stream)} tokens has no random windows of {length}")
    starts = [draw.randint(0, len(stream) - length - 1) for _ in range(count)]
    return torch.stack([stream[start : start + length] for start in starts])


def random_documents(
    documents: Documents, tokenize: Tokenize, count: int, length: int, draw: random.Random
) -> Tensor:
    """One window [count, length] at a random offset of each of ``count`` random documents.

    Only documents of more than ``length`` tokens count, as in GPTQ's get_c4 (which fails at exactly
    ``length``). Raises DataError when such documents are not found.
    """
    return torch.stack([_from_document(documents, tokenize, length, draw) for _ in range(count)])


def _from_document(
    documents: Documents, tokenize: Tokenize, length: int, draw: random.Random
) -> Tensor:
    for _ in range(min(_MISSES, 20 * len(documents) + 100)):
        ids = tokenize(documents[draw.randint(0, len(documents) - 1)])
        if len(ids) > length:
            return random_offsets(ids, 1, length, draw)[0]
    raise DataError(
        f"no document of more than {length} tokens was found among {len(documents)}; ask for "
        "shorter windows"
    )
