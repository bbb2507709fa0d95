"""Tiny random causal LMs of the architectures that people load beside those of architectures.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import transformers as hf
from transformers import PreTrainedModel

from tests.architectures import POSITIONS, VOCABULARY, WINDOW, build

_IDS: Final = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES: Final = {
    **_IDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_GROUPED: Final = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2}


def _of(name: str, sizes: dict[str, Any] = _GROUPED, **changes: Any) -> PreTrainedModel:
    """``name`` is of ForCausalLM's class and of its Config's."""
    config = getattr(hf, f"{name}Config")(**{**sizes, **changes})
    return build(getattr(hf, f"{name}ForCausalLM"), config)


def _falcon(**changes: Any) -> PreTrainedModel:
    return _of("Falcon", {**_SIZES, "ffn_hidden_size": 64, "alibi": False}, **changes)


def _xglm() -> PreTrainedModel:
    sizes = {**_IDS, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}
    return build(
        hf.XGLMForCausalLM,
        hf.XGLMConfig(**sizes, max_position_embeddings=POSITIONS),
        attention="eager",
    )


def _mpt() -> PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4}
    config = hf.MptConfig(**sizes, max_seq_len=POSITIONS, expansion_ratio=2)
    return build(hf.MptForCausalLM, config, attention="eager")


def _gpt_bigcode(multi_query: bool) -> PreTrainedModel:
    sizes = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = hf.GPTBigCodeConfig(**sizes, n_positions=POSITIONS, multi_query=multi_query)
    return build(hf.GPTBigCodeForCausalLM, config)


def _lfm2() -> PreTrainedModel:
    return _of(
        "Lfm2",
        layer_types=["conv", "full_attention"],
        conv_L_cache=3,
        block_ff_dim=64,
        block_auto_adjust_ff_dim=False,
    )


def _gpt_oss() -> PreTrainedModel:
    config = hf.GptOssConfig(
        **{**_GROUPED, "intermediate_size": 32},
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    )
    return build(hf.GptOssForCausalLM, config, attention="eager")


DENSE: Final[dict[str, Callable[[], PreTrainedModel]]] = {
    "falcon-new": partial(_falcon, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-multi-query": partial(_falcon, multi_query=True, parallel_attn=True),
    "falcon-alibi": partial(_falcon, multi_query=False, alibi=True, parallel_attn=False, bias=True),
    "stablelm": partial(_of, "StableLm"),
    "cohere": partial(_of, "Cohere", use_qk_norm=True),
    "cohere2": partial(_of, "Cohere2", head_dim=8, sliding_window=WINDOW, sliding_window_pattern=2),
    "granite": partial(
        _of,
        "Granite",
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
        logits_scaling=2.0,
    ),
    "olmo": partial(_of, "Olmo", clip_qkv=2.0),
    "starcoder2": partial(_of, "Starcoder2", use_bias=True, sliding_window=WINDOW),
    "gpt-bigcode": partial(_gpt_bigcode, True),
    "gpt-bigcode-multi-head": partial(_gpt_bigcode, False),
    "glm": partial(_of, "Glm", head_dim=8),
    "gemma": partial(_of, "Gemma", head_dim=8),
    "smollm3": partial(_of, "SmolLM3", no_rope_layers=[1, 0]),
    "nemotron": partial(_of, "Nemotron"),
    "xglm": _xglm,
    "mpt": _mpt,
    "lfm2": _lfm2,
}
MIXTURES: Final[dict[str, Callable[[], PreTrainedModel]]] = {
    "mixtral": partial(_of, "Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": partial(
        _of,
        "Qwen3Moe",
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        mlp_only_layers=[1],
    ),
    "olmoe": partial(_of, "Olmoe", intermediate_size=32, num_experts=4, num_experts_per_tok=2),
    "gpt-oss": _gpt_oss,
}
MORE: Final = {**DENSE, **MIXTURES}
