"""Tiny random causal LMs of the common architectures, in eval mode, the same on every call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final
from unittest import mock

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.environments import TRANSFORMERS_5

VOCABULARY: Final = 128
POSITIONS: Final = 64
WINDOW: Final = 6  # sliding windows, shorter than every probe

_COMMON: Final = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OPT: Final = {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32}
_GROUPED: Final = {**_COMMON, "intermediate_size": 64, "num_key_value_heads": 2}
_GPT: Final = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@contextmanager
def unset_is_nan() -> Iterator[None]:
    """A parameter that a constructor leaves to ``initialize_weights`` is NaN, not old memory."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Weights that use every parameter and keep activations near size 1.

    Hugging Face starts biases at 0, gains at 1 and weights at 0.02: the logits of such a model
    hardly depend on its input. Here a linear's rows have norm 1, embeddings are standard normal
    and every vector (bias, gain) is moved by 0.3 of a standard normal, from 1 where it is NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[Tensor] = set()  # a tied head keeps the embedding's values

    def normal(parameter: Tensor) -> Tensor:
        return torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter in done:
                continue
            done.add(parameter)
            if parameter.dim() < 2:
                parameter.copy_(parameter.nan_to_num(nan=1.0) + 0.3 * normal(parameter))
            else:
                inputs = parameter.shape[0 if isinstance(module, Conv1D) else -1]
                scale = 1.0 if isinstance(module, nn.Embedding) else 1 / math.sqrt(inputs)
                parameter.copy_(scale * normal(parameter))


def build(
    model_class: Any, config: PretrainedConfig, *, attention: str = "sdpa", seed: int = 0
) -> PreTrainedModel:
    """A random model of ``config``, float32, in eval mode."""
    # OPT's own initialisation fails where its LayerNorms have no gain.
    with torch.random.fork_rng([]), mock.patch.object(PreTrainedModel, "initialize_weights"):
        torch.manual_seed(seed)
        with unset_is_nan():
            model: PreTrainedModel = model_class._from_config(config, attn_implementation=attention)
    randomize(model, seed)
    unset = [name for name, value in model.state_dict().items() if value.isnan().any()]
    assert not unset, f"nobody gave {unset} a value"
    return model.eval()


def opt(seed: int = 0, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    config = hf.OPTConfig(**{**_OPT, **changes})
    return build(hf.OPTForCausalLM, config, attention=attention, seed=seed)


def gpt2(seed: int = 0, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    config = hf.GPT2Config(**{**_GPT, **changes})
    return build(hf.GPT2LMHeadModel, config, attention=attention, seed=seed)


def llama(seed: int = 0, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    config = hf.LlamaConfig(**{**_GROUPED, **changes})
    return build(hf.LlamaForCausalLM, config, attention=attention, seed=seed)


def _gemma2(attention: str) -> PreTrainedModel:
    # Caps near the size of the scores and logits, so that a forgotten cap shows.
    config = hf.Gemma2Config(
        **_GROUPED,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=5.0,
    )
    return build(hf.Gemma2ForCausalLM, config, attention=attention)


def _gpt_neo() -> PreTrainedModel:
    config = hf.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=POSITIONS,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        bos_token_id=1,
        eos_token_id=2,
    )
    return build(hf.GPTNeoForCausalLM, config, attention="eager")


def _neox(parallel: bool) -> PreTrainedModel:
    config = hf.GPTNeoXConfig(**_COMMON, intermediate_size=64, use_parallel_residual=parallel)
    return build(hf.GPTNeoXForCausalLM, config)


def _llama_like(name: str, **changes: Any) -> PreTrainedModel:
    config = getattr(hf, f"{name}Config")(**_GROUPED, **changes)
    return build(getattr(hf, f"{name}ForCausalLM"), config)


ARCHITECTURES: Final[dict[str, Callable[[], PreTrainedModel]]] = {
    "opt": opt,
    "opt-post-layernorm": partial(opt, do_layer_norm_before=False, word_embed_proj_dim=16),
    "opt-no-bias": partial(opt, enable_bias=False, layer_norm_elementwise_affine=False),
    "opt-untied": partial(opt, tie_word_embeddings=False),
    "opt-eager": partial(opt, attention="eager"),
    "gpt2": gpt2,
    "gpt2-eager": partial(gpt2, attention="eager"),
    "llama": llama,
    "llama-eager": partial(llama, attention="eager"),
    "qwen2": partial(_llama_like, "Qwen2"),
    "qwen3": partial(_llama_like, "Qwen3", head_dim=8),
    "mistral": partial(_llama_like, "Mistral", sliding_window=WINDOW),
    **({} if TRANSFORMERS_5 else {"gemma2-sdpa": partial(_gemma2, "sdpa")}),  # 5: eager only
    "gemma2-eager": partial(_gemma2, "eager"),
    "gemma3": lambda: build(
        hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=WINDOW)
    ),
    "phi": lambda: build(hf.PhiForCausalLM, hf.PhiConfig(**_COMMON, intermediate_size=64)),
    "phi3": partial(_llama_like, "Phi3"),
    "gpt-neox-parallel": partial(_neox, True),
    "gpt-neox-sequential": partial(_neox, False),
    "gpt-neo": _gpt_neo,
    "gptj": lambda: build(
        hf.GPTJForCausalLM, hf.GPTJConfig(**_GPT, rotary_dim=4), attention="eager"
    ),
    "bloom": lambda: build(
        hf.BloomForCausalLM,
        hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        attention="eager",
    ),
    "olmo2": partial(_llama_like, "Olmo2"),
}


def token_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random ids [batch, length] without the padding id 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def padding_mask(batch: int, length: int, padding: str) -> Tensor:
    """0 at padding: "left" (rows of various lengths), "right", "both", or "none"."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        amount = min((row + 1) * length // 5, length - 1)
        if padding in ("left", "both"):
            mask[row, :amount] = 0
        if padding in ("right", "both") and amount + 1 < length - amount:
            mask[row, length - amount :] = 0
    return mask
