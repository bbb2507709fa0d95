"""GGUF files in llama.cpp: ``make llama-check`` brings its Python binding."""

from __future__ import annotations

import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.llama_check import TOLERANCE, same_tokens, tried
from benchmarks.llama_engine import Engine
from benchmarks.llama_texts import TEXTS, lines, random_texts
from fxquant.errors import ExportError
from fxquant.exports import gguf
from fxquant.exports.gguf_file import MODEL
from tests.architectures import build, randomize
from tests.test_export_compressed import tiny_llama
from tests.test_export_gguf import SIZES, llama_for, qwen, trained
from tests.test_gguf_differences import HELD, random_pieces
from tests.test_gguf_tokenizers import QWEN2, by_pattern

pytestmark = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama_cpp is not here: make llama-check brings it"
)


def mistral() -> PreTrainedModel:
    model = build(MistralForCausalLM, MistralConfig(**{**SIZES, "head_dim": 32}))
    randomize(model, 3)
    return model


MODELS: dict[str, Any] = {
    "tied Llama": tiny_llama,
    "Llama": lambda: tiny_llama(tied=False),
    "Llama in fp16": lambda: tiny_llama(dtype=torch.float16),
    "Llama in bf16": lambda: tiny_llama(dtype=torch.bfloat16),
    "Mistral, wider heads": mistral,
    "Qwen 2": lambda: qwen(2),
    "Qwen 3": lambda: qwen(3),
}
MIXED = (
    '{"scheme": "w4-g32-fp16", "overrides": {"embeddings": "w8-g32-fp16", "head": "w8-g32-fp16", '
    '"*.down_proj": "w4-g32-fp16-asym", "*.o_proj": "fp"}}'
)
SCHEMES = ("fp", "w8-g32-fp16", "w4-g32-fp16", "w4-g32-fp16-asym", MIXED)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_graph_by_its_rule(name: str, scheme: str) -> None:
    """``tried`` raises where codes or a float file's logits are not what they must be."""
    model = MODELS[name]()
    windows = torch.randint(0, 96, (2, 48))
    found = tried(model, scheme, windows)
    assert found.product <= TOLERANCE
    assert found.logits <= 0.2 * found.largest


BYTES = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smaug-bpe": by_pattern(),
    "qwen2": by_pattern(pattern=QWEN2),
}
PIECES = {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}


def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {name: trained("Ġ", split) for name, split in BYTES.items()} | {
        "llama-bpe": trained("Ġ", by_pattern(), ignore_merges=True),
        "pieces": trained("▁", None, **PIECES),
        **{name: made() for name, made in HELD.items()},
    }


@pytest.mark.parametrize("name", tokenizers())
def test_llama_cpp_gives_the_tokenizers_ids(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizers()[name]
    gguf(llama_for(tokenizer), tmp_path / "out", scheme="fp", tokenizer=tokenizer, check=False)
    with Engine.of(tmp_path / "out" / MODEL) as engine:
        texts = [*TEXTS, *lines(100), *random_texts(300, torch.initial_seed())]
        assert same_tokens(tokenizer, engine, texts) == []


@pytest.mark.parametrize("seed", range(12))
def test_llama_cpp_joins_what_random_merges_do_or_it_is_refused(seed: int, tmp_path: Path) -> None:
    tokenizer, source = random_pieces(seed), random.Random(seed)
    texts = ["".join(source.choices("abcd ", k=source.randrange(1, 10))) for _ in range(300)]
    try:
        gguf(llama_for(tokenizer), tmp_path / "out", scheme="fp", tokenizer=tokenizer, check=False)
    except ExportError as error:
        joined = re.search(r"to the token '([abcd]+)', which its merges leave apart", str(error))
        assert joined is not None
        assert len(tokenizer.backend_tokenizer.model.tokenize(joined[1])) > 1
        return
    with Engine.of(tmp_path / "out" / MODEL) as engine:
        assert same_tokens(tokenizer, engine, texts) == []
