"""What llama.cpp calls a model of Llama's shape and its parts, and what of one it does not know."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from torch.fx import GraphModule
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from fxquant.ir.graph import info


@dataclass(frozen=True)
class Architecture:
    """``name``: llama.cpp's; ``pairs``: whether it rotates neighbours, so that rows of q and k
    stand in another order."""

    name: str
    pairs: bool = False


ARCHITECTURES: Final = {
    "llama": Architecture("llama", pairs=True),
    "mistral": Architecture("llama", pairs=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
}


def unknown(gm: GraphModule) -> str:
    """What there is in the graph's model that a file cannot say, "" where it can say all."""
    config = json.loads(info(gm).config or "{}")
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return f"a model of type {kind} is not written here, of which {known} are"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default"))
    if scaled != "default":
        return f"its rotary embeddings are scaled ({scaled}), which transformers does not read back"
    if config.get("hidden_act", "silu") != "silu":
        return f"llama.cpp gates with silu, not with {config['hidden_act']}"
    window, most = config.get("sliding_window"), config.get("max_position_embeddings", 0)
    if window and window < most and config.get("use_sliding_window", True):
        return f"it attends to {window} tokens only, and the file's architecture has no window"
    if config.get("mlp_bias") or (config.get("attention_bias") and kind != "qwen2"):
        return "its linears have biases, which transformers does not read back"
    return ""


def vocabulary_size(source: PreTrainedModel | GraphModule) -> int | None:
    """Rows of the embedding; None for a model of a type that is not known."""
    if isinstance(source, GraphModule):
        kind = json.loads(info(source).config or "{}").get("model_type")
        return info(source).vocab_size if kind in ARCHITECTURES else None
    kind = getattr(getattr(source, "config", None), "model_type", None)  # of no model: none
    return int(source.config.vocab_size) if kind in ARCHITECTURES else None


def architecture(gm: GraphModule) -> Architecture:
    return ARCHITECTURES[json.loads(info(gm).config)["model_type"]]


def add_model(writer: Any, config: PretrainedConfig, name: str) -> None:
    """Write the model's sizes and constants."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(_theta(config))
    writer.add_vocab_size(config.vocab_size)


def add_generation(writer: Any, config: GenerationConfig) -> None:
    """Write how the model picks a token where it samples, and what it takes off repeated ones; the
    rest of a generation config (lengths, beams, several ends) has no place in the format."""
    writers = {"repetition_penalty": writer.add_sampling_penalty_repeat}
    if config.do_sample:
        writers |= {
            "temperature": writer.add_sampling_temp,
            "top_k": writer.add_sampling_top_k,
            "top_p": writer.add_sampling_top_p,
            "min_p": writer.add_sampling_min_p,
        }
    for name, write in writers.items():
        value = getattr(config, name, None)
        if value is not None:
            write(value)


def _theta(config: PretrainedConfig) -> float:
    rope = getattr(config, "rope_parameters", None)
    return float(rope["rope_theta"] if rope else config.rope_theta)
