"""What kind of value each field of a config.json takes, as the architecture's defaults tell.

transformers takes any value for any field; some are looked at only when the model is built, or when
it runs, and differently where it is built without its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fxquant.errors import ModelError
from fxquant.files.doors import printable

_DTYPES: Final = ("float32", "float16", "bfloat16", "float64")
_ATTENTIONS: Final = (
    "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention",
)  # fmt: skip
_LARGEST: Final = 2**31 - 1
_KINDS: Final = ("num_", "n_")  # heads, say: each may become an object
_MOST_OF_A_KIND: Final = 1_000_000
# Those that become objects as soon as the config or the model is built: texts, modules.
_BUILT: Final = {"labels": 100_000, "experts": 10_000, "layers": 10_000}
_LONG: Final = ("n_positions", "n_ctx", "n_embd", "n_inner")
# Fields that send transformers to other files, or to code.
_REDIRECTING: Final = (
    "transformers_weights", "configuration_files", "gguf_file", "subfolder", "variant",
    "base_model_name_or_path", "adapter_kwargs", "use_kernels", "kernel_config",
)  # fmt: skip


def check_kinds(path: Path, data: Mapping[str, Any]) -> None:
    """Raise ModelError, naming file and field, for a value that cannot be of its field.

    Truth values and fractions are known by the defaults of the config's class; 0 and 1 are taken
    for truth values, as transformers does. Whole numbers are bounded whatever their field, since
    some become as many objects.
    """
    _check(path, data, _defaults(data.get("model_type")), "")


def shown(value: object) -> str:
    """A value for a message, of bounded length."""
    text = printable(repr(value))
    return text if len(text) <= 60 else f"{text[:60]}..."


def _defaults(kind: object) -> Mapping[str, Any]:
    """Every field of the config's class with its default; those of all classes for another."""
    general: dict[str, Any] = PretrainedConfig().to_dict()
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return general
    try:
        return {**general, **CONFIG_MAPPING[kind]().to_dict()}
    except (TypeError, ValueError):  # a config of several models has no defaults
        return general


def _check(path: Path, data: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> None:
    for name, value in data.items():
        place = f"{path}: {prefix}{printable(name)[:60]}"
        if value is None:
            continue
        if callable(getattr(PretrainedConfig, name, None)):
            raise ModelError(f"{place} is no field of a config: remove it")
        if name in _REDIRECTING and value is not False:
            raise ModelError(
                f"{place} would have {shown(value)} loaded in place of this folder's own files: "
                "remove it"
            )
        _check_named(place, name, value)
        _check_default(place, name, value, defaults.get(name))
        _check_numbers(place, name, value)
        if isinstance(value, Mapping):
            below = defaults.get(name)
            _check(path, value, below if isinstance(below, Mapping) else {}, f"{prefix}{name}.")


def _check_named(place: str, name: str, value: object) -> None:
    if name in ("dtype", "torch_dtype"):
        if isinstance(value, str) and value.removeprefix("torch.") in (*_DTYPES, "auto"):
            return
        raise ModelError(
            f"{place} is {shown(value)}, which is no float dtype that a model is computed in: "
            f"{', '.join(_DTYPES)}"
        )
    if name == "pruned_heads" and value:
        raise ModelError(
            f"{place} is {shown(value)}, heads to be cut out of the weights on loading, which "
            "fxquant does not do: save the model with them cut out, and remove it"
        )
    if name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        check_attention(place, value)


def check_attention(place: str, value: object) -> None:
    """Raise ModelError, naming ``place``, for what is none of transformers' own attentions."""
    if value not in _ATTENTIONS:
        raise ModelError(
            f"{place} is {shown(value)}, which is none of {', '.join(_ATTENTIONS)}; kernels from "
            "elsewhere are code, which fxquant does not run: remove it"
        )


def _check_default(place: str, name: str, value: object, default: object) -> None:
    if isinstance(default, bool):
        if not isinstance(value, bool) and not (isinstance(value, int) and value in (0, 1)):
            raise ModelError(f"{place} must be true or false, got {shown(value)}")
    elif isinstance(default, float):
        if not _is_finite(value):
            raise ModelError(f"{place} must be a finite number, got {shown(value)}")
        if name.endswith(("dropout", "_pdrop", "_drop", "layerdrop")) and not 0 <= value <= 1:  # type: ignore[operator]
            raise ModelError(f"{place} must be from 0 to 1, got {shown(value)}")


def _check_numbers(place: str, name: str, value: object) -> None:
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, float) and not math.isfinite(each):
            raise ModelError(f"{place} must be a finite number, got {shown(each)}")
        if type(each) is int and not -_LARGEST - 1 <= each <= _most(name):
            raise ModelError(f"{place} must be at most {_most(name)}, got {shown(each)}")


def _most(name: str) -> int:
    if not name.startswith(_KINDS) or name in _LONG:
        return _LARGEST
    return _BUILT.get(name.rpartition("_")[2], _MOST_OF_A_KIND)


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= torch.finfo(torch.float64).max
