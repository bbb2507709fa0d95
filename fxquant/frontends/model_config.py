"""config.json, looked through before transformers builds anything from its values."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from fxquant.errors import ModelError
from fxquant.files.doors import read_object
from fxquant.frontends.config_kinds import check_kinds
from fxquant.frontends.config_kinds import shown as _shown

CONFIG: Final = "config.json"
_LARGEST: Final = 2**31 - 1
_MOST_LAYERS: Final = 10_000
_LAYERS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIZES: Final = (
    "hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "head_dim",
    "num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads",
    "intermediate_size", "ffn_dim", "n_inner", "vocab_size", "max_position_embeddings",
    "n_positions", *_LAYERS,
)  # fmt: skip
_NEEDED: Final = (
    "hidden_size", "n_embd", "d_model", "vocab_size", "num_attention_heads", "n_head", *_LAYERS,
)  # fmt: skip
_ACTIVATIONS: Final = ("hidden_act", "activation_function", "hidden_activation")


def refuse_adapter(directory: Path) -> None:
    """Raise ModelError for a folder with an adapter, which may hold no config.json."""
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"{directory} holds an adapter (adapter_config.json), which would not be applied: "
            "merge it into the model's weights first"
        )


def check_python() -> None:
    """ModelError where Python keeps no docstrings."""
    if sys.flags.optimize > 1:
        raise ModelError(
            "python -OO (PYTHONOPTIMIZE=2) strips docstrings, which transformers reads when it "
            "makes a model's classes: run it without, or with -O"
        )


def check_config_file(directory: Path, coded: bool = False) -> None:
    """Raise ModelError, naming the field, for a config.json that describes no float causal LM.

    Sizes must be whole numbers from 1, activations known to transformers, other values of their
    fields' kinds; what names other files than this folder's is refused, and so is a checkpoint that
    is quantized already, unless ``coded``, or only an adapter.
    """
    refuse_adapter(directory)
    path = directory / CONFIG
    if not path.exists():
        raise ModelError(
            f"{directory} holds no model ({CONFIG}): model.save_pretrained writes one there"
        )
    data = read_object(path, ModelError)
    kind = data.get("model_type")
    if kind is not None and (not isinstance(kind, str) or not kind):
        raise ModelError(f"{path}: model_type must be text such as 'opt', got {_shown(kind)}")
    _check_fields(path, data, "")
    check_kinds(path, data)
    if data.get("quantization_config") is not None and not coded:
        raise ModelError(
            f"{path}: quantization_config says that the weights are quantized already; fxquant "
            "starts from the float checkpoint"
        )


def _check_fields(path: Path, data: Mapping[str, Any], prefix: str) -> None:
    for name, value in data.items():
        if name in _SIZES and (value is not None or name in _NEEDED):
            _check_size(path, prefix + name, value, _MOST_LAYERS if name in _LAYERS else _LARGEST)
        elif name in _ACTIVATIONS and value is not None:
            _check_activation(path, prefix + name, value)
        elif name.endswith("_config") and isinstance(value, Mapping):
            _check_fields(path, value, f"{prefix}{name}.")


def _check_size(path: Path, name: str, value: object, most: int) -> None:
    values = value if isinstance(value, list) and value else [value]  # some have one a layer
    for each in values:
        if type(each) is not int or not 1 <= each <= most:
            raise ModelError(
                f"{path}: {name} must be a whole number from 1 to {most}, got {_shown(each)}"
            )


def _check_activation(path: Path, name: str, value: object) -> None:
    if not isinstance(value, str) or value not in ACT2FN:
        raise ModelError(
            f"{path}: {name} is {_shown(value)}, which transformers does not know; known: "
            f"{', '.join(sorted(ACT2FN)[:8])}, ..."
        )


def check_config(config: PretrainedConfig, name: str) -> None:
    """Raise ModelError for values that would run code, load other weights or stand for no dtype.

    ``_attn_implementation`` may name a kernel on the hub, which transformers downloads and runs.
    """
    if getattr(config, "transformers_weights", None) is not None:
        raise ModelError(
            f"{name}: config.json's transformers_weights names another weight file: remove it"
        )
    configs = [config, *(getattr(config, key, None) for key in config.sub_configs)]
    for each in configs:
        attention = getattr(each, "_attn_implementation", None)
        if attention is not None and (not isinstance(attention, str) or "/" in attention):
            raise ModelError(
                f"{name}: config.json asks for the attention {_shown(attention)}, which is code "
                "from elsewhere; fxquant does not run it: remove _attn_implementation"
            )
        dtype = getattr(each, "dtype", None)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ModelError(f"{name}: config.json's dtype {_shown(dtype)} is no float dtype")
