"""What transformers 5 writes is read by either: rotary fields, and tokenizers without a class."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fxquant
from fxquant.errors import ModelError
from fxquant.frontends.pretrained import empty_model, read_config, read_model, read_tokenizer
from fxquant.frontends.streaming import stream
from tests.architectures import llama, token_ids
from tests.environments import reads_its_own
from tests.hub_format import ALPHABET, character_tokenizer

SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def write(folder: Path, model_type: str, name: str, rope: Any, **more: Any) -> Path:
    """A config.json as transformers 5 writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {**SIZES, "model_type": model_type, "architectures": [name], "rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps({**data, **more}))
    return folder


def frequencies(theta: float, width: int) -> torch.Tensor:
    """What rotary embeddings are by definition: theta^(-2i / width)."""
    powers = -torch.arange(0, width, 2).double() / width
    return torch.exp(powers * math.log(theta))


def found_frequencies(folder: Path, buffer: str) -> torch.Tensor:
    model = empty_model(read_config(folder), str(folder))
    found: torch.Tensor = dict(model.named_buffers())[buffer]
    return found.double()


@pytest.mark.parametrize(
    ("model_type", "name", "key"),
    [
        ("qwen3_moe", "Qwen3MoeForCausalLM", "num_experts"),
        ("olmoe", "OlmoeForCausalLM", "num_experts"),
        ("mixtral", "MixtralForCausalLM", "num_local_experts"),
    ],
)
def test_the_number_of_experts_is_read(
    tmp_path: Path, model_type: str, name: str, key: str
) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    folder = write(tmp_path / "model", model_type, name, rope, num_local_experts=3)
    config: Any = read_config(folder)
    assert getattr(config, key) == 3


@pytest.mark.parametrize(
    ("model_type", "name", "theta", "partial", "buffer"),
    [
        ("llama", "LlamaForCausalLM", 77.0, None, "model.rotary_emb.inv_freq"),
        ("cohere", "CohereForCausalLM", 9000.0, None, "model.rotary_emb.inv_freq"),
        ("gpt_neox", "GPTNeoXForCausalLM", 300.0, 0.5, "gpt_neox.rotary_emb.inv_freq"),
        ("phi", "PhiForCausalLM", 20000.0, 0.25, "model.rotary_emb.inv_freq"),
        ("stablelm", "StableLmForCausalLM", 55.0, 0.5, "model.rotary_emb.inv_freq"),
    ],
)
def test_rotary_fields_mean_what_they_say(
    model_type: str, name: str, theta: float, partial: float | None, buffer: str, tmp_path: Path
) -> None:
    rope = {"rope_type": "default", "rope_theta": theta}
    if partial is not None:
        rope["partial_rotary_factor"] = partial
    folder = write(tmp_path, model_type, name, rope)
    expected = frequencies(theta, int(8 * (partial or 1)))
    torch.testing.assert_close(
        found_frequencies(folder, buffer), expected, rtol=1e-6, atol=0, check_dtype=False
    )


def test_layers_of_two_kinds_have_each_its_own(tmp_path: Path) -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
    kinds = ["sliding_attention", "full_attention"]
    folder = write(
        tmp_path, "gemma3_text", "Gemma3ForCausalLM", rope, head_dim=8, layer_types=kinds
    )
    buffers = empty_model(read_config(folder), str(folder)).named_buffers()
    found = [b.double() for n, b in buffers if n.endswith("inv_freq") and "original" not in n]
    found.sort(key=lambda each: float(each.sum()))
    full, sliding = frequencies(5000.0, 8) / 4, frequencies(50.0, 8)
    for one, other in zip(found, (full, sliding), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_a_scaled_model_computes_the_same_either_way(tmp_path: Path) -> None:
    """Fields of 4.57 against those of 5, through files, in memory and streamed."""
    old: dict[str, Any] = {"rope_theta": 77.0, "rope_scaling": LLAMA3}
    model = llama(**old)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    for name in (*old, "rope_parameters"):
        data.pop(name, None)
    unscaled = llama()(token_ids(2, 20)).logits
    path.write_text(json.dumps({**data, "rope_parameters": {**LLAMA3, "rope_theta": 77.0}}))
    expected = model(token_ids(2, 20)).logits
    assert not torch.allclose(expected, unscaled, atol=1e-2)
    loaded = read_model(tmp_path, dtype=torch.float32)
    for each in (loaded, stream(tmp_path), fxquant.trace(loaded)):
        with torch.no_grad():
            found = each(token_ids(2, 20))
        torch.testing.assert_close(getattr(found, "logits", found), expected, rtol=1e-5, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    again = read_model(tmp_path / "again", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(token_ids(2, 20)).logits, loaded(token_ids(2, 20)).logits)


@reads_its_own
@pytest.mark.parametrize(
    ("model_type", "rope", "named"),
    [
        ("llama", {"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_type": "default", "rope_theta": 9.0, "factor": 2.0}, "factor"),
        ("opt", {"rope_type": "default", "rope_theta": 9.0}, "rope_theta"),
        ("llama", {"full_attention": {"rope_theta": 9.0}}, "full_attention"),
        (
            "gemma3_text",
            {"full_attention": {"rope_theta": 9.0}, "sliding_attention": {"rope_type": "linear"}},
            "sliding_attention",
        ),
        ("llama", [9.0], "no object"),
    ],
)
def test_what_has_no_field_is_refused(
    model_type: str, rope: Any, named: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, model_type, "LlamaForCausalLM", rope)
    with pytest.raises(ModelError, match=rf"rope_parameters.*{named}"):
        read_config(folder)


@pytest.mark.parametrize("more", [{}, {"extra_special_tokens": ["<x>"]}])
def test_a_tokenizer_without_a_class_of_its_own(more: dict[str, Any], tmp_path: Path) -> None:
    expected = character_tokenizer()
    expected.save_pretrained(tmp_path)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    config = {
        "backend": "tokenizers", "bos_token": "<s>", "unk_token": "<s>", "is_local": True,
        "tokenizer_class": "TokenizersBackend", "model_max_length": 1e30, **more,
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = read_tokenizer(tmp_path)
    text = ALPHABET[3:9] + ALPHABET[1:4]
    assert found(text)["input_ids"] == expected(text)["input_ids"]
    assert found.bos_token == "<s>"
    assert ("<x>" in found.all_special_tokens) == bool(more)
