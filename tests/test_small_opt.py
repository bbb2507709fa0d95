"""The built-in text, and the small OPT that was trained on it."""

import json
from collections.abc import Mapping
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from fxquant.evaluation import builtin_text as module
from fxquant.evaluation.builtin_text import Split, builtin_text
from tests.models import SMALL_OPT, small_opt
from tests.small_opt.train import sha256, unigram_entropy

SPLITS: tuple[Split, ...] = get_args(Split)


def long_paragraphs(text: str) -> set[str]:
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return {paragraph for paragraph in paragraphs if len(paragraph) > 80}


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((SMALL_OPT / "TRAINING.json").read_text())
    return loaded


# The text


def test_no_long_paragraph_occurs_in_two_splits() -> None:
    train, calibration, evaluation = (long_paragraphs(builtin_text(split)) for split in SPLITS)
    assert min(len(train), len(calibration), len(evaluation)) > 50
    assert not train & calibration | train & evaluation | calibration & evaluation


def test_each_held_out_split_has_sixteen_windows_and_several_topics() -> None:
    for split in ("calibration", "evaluation"):
        # 16 windows of 512 tokens are about 33 kB; they must not be one topic only.
        text = builtin_text(split)
        assert len(text) > 60_000
        titles = [line for line in text[:33_000].splitlines() if line.startswith("****")]
        assert len(titles) >= 4
    assert len(builtin_text("train")) > 150_000


def test_the_text_is_the_same_on_every_call() -> None:
    assert builtin_text("evaluation") == builtin_text("evaluation")


def test_unknown_split_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'test'.*train, calibration, evaluation"):
        builtin_text("test")  # type: ignore[arg-type]


NAMES = st.sampled_from(["assert", "binary", "calls", "class", "raise", "types", "with", "yield"])


@settings(deadline=None)
@given(st.dictionaries(NAMES, st.sets(st.integers(0, 6), min_size=1)))
def test_topics_that_share_a_paragraph_share_a_split(holdings: Mapping[str, set[int]]) -> None:
    topics = {
        name: "\n\n".join(f"{number} " * 60 for number in sorted(numbers))
        for name, numbers in holdings.items()
    }
    splits = module._assign_splits(topics)
    assert splits.keys() == topics.keys()
    for number in range(7):
        assert len({splits[name] for name in topics if number in holdings[name]}) <= 1


# The model


def test_the_committed_directory_is_small() -> None:
    assert sum(path.stat().st_size for path in SMALL_OPT.rglob("*")) <= 4 * 2**20


def test_it_is_a_pre_layernorm_relu_opt(record: dict[str, Any]) -> None:
    model, tokenizer = small_opt()
    config = model.config
    assert config.do_layer_norm_before
    assert config.enable_bias
    assert config.activation_function == "relu"
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert len(tokenizer) == config.vocab_size
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert not model.training


def test_it_has_learned_what_the_record_says(record: dict[str, Any]) -> None:
    model, tokenizer = small_opt()
    text = builtin_text("evaluation")
    stream: Tensor = torch.tensor(tokenizer(text)["input_ids"])
    length = record["window"]
    windows = stream[: len(stream) // length * length].view(-1, length)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=batch).logits for batch in windows.split(8)])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item()
    assert loss < unigram_entropy(stream) - 1
    if sha256(text) != record["evaluation_sha256"]:
        pytest.skip("this Python version ships other text than the record's")
    assert loss == pytest.approx(record["evaluation_loss"], abs=0.02)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return small_opt()[1]


@settings(deadline=None)
@given(text=st.text())
def test_the_tokenizer_gives_every_text_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
