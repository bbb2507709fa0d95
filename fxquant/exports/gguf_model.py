"""What llama.cpp calls a model of Llama's shape and its parts, and what of one it does not know."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Final

import torch
from torch.fx import GraphModule
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from fxquant.ir.graph import float_dtype, info


@dataclass(frozen=True)
class Architecture:
    """What a type of model is in llama.cpp, and what of its config the model itself reads.

    Attributes:
        name: llama.cpp's.
        pairs: whether it rotates neighbours, so that rows of q and k stand in another order.
        biases: what gives its linears biases that transformers does not read back.
        windowed: whether a sliding window is of "all" layers, of "some", or of none.
    """

    name: str
    pairs: bool = False
    biases: tuple[str, ...] = ()
    windowed: str = "some"


ARCHITECTURES: Final = {
    "llama": Architecture("llama", True, ("attention_bias", "mlp_bias"), windowed=""),
    "mistral": Architecture("llama", True, windowed="all"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", biases=("attention_bias",)),
}
# Names of models whose special tokens llama.cpp gives flags of their own.
_TREATED: Final = ("phi-3", "phi3", "modern-bert")
# What transformers takes for the length of a head of these, whatever the file says.
_QWEN3_HEAD: Final = 128


def unknown(gm: GraphModule) -> str:
    """What there is in the graph's model that a file cannot say, "" where it can say all."""
    config = json.loads(info(gm).config or "{}")
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return f"a model of type {kind} is not written here, of which {known} are"
    # transformers 5 reads the one, 4 the other, where it keeps rope_theta apart.
    rope = config.get("rope_scaling" if "rope_theta" in config else "rope_parameters") or {}
    scaled = rope.get("rope_type", rope.get("type", "default"))
    if scaled != "default":
        return f"its rotary embeddings are scaled ({scaled}), which transformers does not read back"
    if float_dtype(gm) == torch.float64:
        return "it is in float64, and a file's products are in float32 at most: take model.float()"
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        return f"llama.cpp gates with silu, not with {config['hidden_act']}"
    if config.get("max_position_embeddings") is None:
        return "its config has no max_position_embeddings, which a file holds"
    window = _window(config, ARCHITECTURES[kind].windowed)
    if window:
        return f"it attends to {window} tokens only, and the file's architecture has no window"
    if any(config.get(name) for name in ARCHITECTURES[kind].biases):
        return "its linears have biases, which transformers does not read back"
    return ""


def _window(config: dict[str, Any], windowed: str) -> int:
    """To how many tokens a layer attends; 0 where all attend to every one."""
    window = config.get("sliding_window")
    if not window or not windowed or window >= config["max_position_embeddings"]:
        return 0
    if windowed == "some":
        layers, first = config["num_hidden_layers"], config.get("max_window_layers", 28)
        usual = ["sliding_attention"] * (config.get("use_sliding_window", False) and first < layers)
        if "sliding_attention" not in (config.get("layer_types") or usual):
            return 0
    return int(window)


def unread(config: dict[str, Any]) -> str:
    """What transformers does not read of a file, which llama.cpp does; "" where it reads all."""
    usual = config["hidden_size"] // config["num_attention_heads"]
    head, kind = config.get("head_dim") or usual, config["model_type"]
    taken = {"qwen2": usual, "qwen3": _QWEN3_HEAD}.get(kind, head)
    if head == taken:
        return ""
    return f"its heads are of {head}, and transformers takes them of {taken} in a file of {kind}"


def known_config(source: PreTrainedModel | GraphModule) -> dict[str, Any]:
    """Of the model of ``source``, as config.json says it; {} for a type that is not known."""
    if isinstance(source, GraphModule):
        found: dict[str, Any] = json.loads(info(source).config or "{}")
    else:
        config = getattr(source, "config", None)  # of no model: none
        found = {} if config is None else config.to_dict()
    return found if found.get("model_type") in ARCHITECTURES else {}


def architecture(gm: GraphModule) -> Architecture:
    return ARCHITECTURES[json.loads(info(gm).config)["model_type"]]


def add_model(writer: Any, config: PretrainedConfig, said: dict[str, Any], name: str) -> None:
    """Write the model's sizes and constants; ``said``: the same config, as its graph keeps it."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(title(name, config.model_type))
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
    writer.add_rope_freq_base(_theta(said))
    writer.add_vocab_size(config.vocab_size)


def title(name: str, kind: str) -> str:
    """A model's name without the folders before it; ``kind`` where llama.cpp would treat the tokens
    of that name otherwise."""
    last = PurePath(name).name or name
    return kind if any(each in last.lower() for each in _TREATED) else last


def add_generation(writer: Any, config: GenerationConfig) -> None:
    """Write how the model picks a token where it samples, and what it takes off repeated ones,
    wherever they stand; the rest of a generation config (lengths, beams) has no place in the
    format."""
    writers = {"repetition_penalty": writer.add_sampling_penalty_repeat}
    if getattr(config, "repetition_penalty", None) is not None:
        writer.add_sampling_penalty_last_n(-1)  # llama.cpp looks at the last 64 otherwise
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


def _theta(config: dict[str, Any]) -> float:
    own = config.get("rope_theta")  # of transformers 4, which reads nothing else
    return float(config["rope_parameters"]["rope_theta"] if own is None else own)
