"""Random windows as GPTQ draws them (Frantar et al. 2023, datautils.py), call for call."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.errors import DataError
from fxquant.evaluation.source import Documents, tokens
from fxquant.evaluation.stream import Cuts, Stream
from fxquant.ir.counted import counted

# A text whose documents are all short would be searched for ever.
_MISSES = 100_000


def random_offsets(stream: Stream, count: int, length: int, draw: random.Random) -> Cuts:
    """``count`` windows [count, length] at random offsets of a stream; they may overlap.

    Raises DataError when the stream has no more than ``length`` tokens.
    """
    if len(stream) <= length:
        raise DataError(
            f"a stream of {counted(len(stream), 'token')} has no random windows of {length}"
        )
    return stream.cut([draw.randint(0, len(stream) - length - 1) for _ in range(count)], length)


def random_documents(
    documents: Documents, tokenizer: Tokenizer, count: int, length: int, draw: random.Random
) -> Cuts:
    """One window [count, length] at a random offset of each of ``count`` random documents.

    Only documents of more than ``length`` tokens count, as in GPTQ's get_c4 (which fails at exactly
    ``length``). Raises DataError when such documents are not found.
    """
    parts = [_from_document(documents, tokenizer, length, draw) for _ in range(count)]
    return Cuts.together(parts)


def _from_document(
    documents: Documents, tokenizer: Tokenizer, length: int, draw: random.Random
) -> Cuts:
    for _ in range(min(_MISSES, 20 * len(documents) + 100)):
        document = documents[draw.randint(0, len(documents) - 1)]
        ids = tokens(document, tokenizer)
        if len(ids) > length:
            return random_offsets(Stream.known(document, ids), 1, length, draw)
    raise DataError(
        f"no document of more than {length} tokens was found among {len(documents)}; ask for "
        "shorter windows"
    )
