"""What transformers 5 writes where 4.57 does not look, put where it does.

4.57 takes a config's ``rope_parameters`` for a field that it need not know, and rotates queries and
keys by its defaults: another model, without a word. It refuses the tokenizers' new class.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import transformers
from transformers import PretrainedConfig

from fxquant.errors import ModelError
from fxquant.files.doors import read_object
from fxquant.frontends.config_kinds import shown

_CLASS: Final = "TokenizersBackend"
READS_ITS_OWN: Final = hasattr(transformers, _CLASS)  # transformers 5 itself
_FULL, _SLIDING = "full_attention", "sliding_attention"
_THETA: Final = ("rope_theta", "rotary_emb_base")
_PARTIAL: Final = ("partial_rotary_factor", "rotary_pct")
_EXPERTS: Final = "num_local_experts"
_LENGTH: Final = "original_max_position_embeddings"


def restore_rope(config: PretrainedConfig, name: str) -> None:
    """Give the fields of 4.57 what ``rope_parameters`` says, in place, and take that away.

    Raises ModelError, naming the field, where the config has no such field in 4.57.
    """
    if READS_ITS_OWN:
        return
    for each in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        rope = getattr(each, "rope_parameters", None)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ModelError(f"{name}: config.json's rope_parameters is {shown(rope)}, no object")
        _restore(each, rope, name)
        del each.rope_parameters


def restore_experts(config: PretrainedConfig) -> None:
    """Give ``num_experts``, as some mixtures of 4.57 say, what 5 calls ``num_local_experts``."""
    written = vars(config).get(_EXPERTS)
    if READS_ITS_OWN or written is None or not hasattr(config, "num_experts"):
        return
    if _EXPERTS not in {*inspect.signature(type(config)).parameters, *config.attribute_map}:
        config.num_experts = written
        delattr(config, _EXPERTS)


def _restore(config: PretrainedConfig, rope: Mapping[str, Any], name: str) -> None:
    if not any(isinstance(value, Mapping) for value in rope.values()):
        _restore_one(config, rope, name)
        return
    sliding = rope.get(_SLIDING)
    if rope.keys() != {_FULL, _SLIDING} or not all(isinstance(v, Mapping) for v in rope.values()):
        raise _unknown(name, f"rope_parameters of {shown(sorted(map(str, rope)))}")
    assert isinstance(sliding, Mapping)
    if sliding.keys() - {"rope_type", "rope_theta"} or sliding.get("rope_type") != "default":
        raise _unknown(name, f"rope_parameters.{_SLIDING} {shown(dict(sliding))}")
    _restore_one(config, rope[_FULL], name)
    _set(config, ("rope_local_base_freq",), sliding.get("rope_theta"), name)


def _restore_one(config: PretrainedConfig, rope: Mapping[str, Any], name: str) -> None:
    rest = {key: value for key, value in rope.items() if value is not None}
    _set(config, _THETA, rest.pop("rope_theta", None), name)
    _set(config, _PARTIAL, rest.pop("partial_rotary_factor", None), name)
    if hasattr(config, _LENGTH):
        _set(config, (_LENGTH,), rest.pop(_LENGTH, None), name)
    if rest.get("rope_type", "default") != "default":
        _set(config, ("rope_scaling",), rest, name)
    elif rest.keys() - {"rope_type"}:
        raise _unknown(name, f"rope_parameters {shown(dict(rope))}")


def _set(config: PretrainedConfig, fields: tuple[str, ...], value: object, name: str) -> None:
    if value is None:
        return
    known = [field for field in fields if hasattr(config, field)]
    if not known:
        raise _unknown(name, f"rope_parameters, whose {fields[0]} is {shown(value)}")
    for field in known:
        setattr(config, field, value)


def _unknown(name: str, what: str) -> ModelError:
    return ModelError(
        f"{name}: config.json has {what}, which transformers {transformers.__version__} has no "
        "field for: transformers 5 wrote it; load it with that"
    )


def tokenizer_arguments(config_file: Path | None) -> dict[str, Any] | None:
    """Arguments of ``PreTrainedTokenizerFast.from_pretrained`` where a tokenizer_config.json needs
    them here; None where AutoTokenizer reads it.

    Transformers 5 calls fast tokenizers without a class of their own ``TokenizersBackend`` and
    lists their special tokens, which 4.57 has under another name.
    """
    if READS_ITS_OWN or config_file is None or not config_file.exists():
        return None
    data = read_object(config_file, ModelError)
    if data.get("tokenizer_class") != _CLASS:
        return None
    more = data.get("extra_special_tokens")
    if isinstance(more, list):
        return {"extra_special_tokens": {}, "additional_special_tokens": more}
    return {}
