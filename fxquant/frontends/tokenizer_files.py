"""A tokenizer's own JSON files, looked through before transformers builds anything from them.

transformers lets tokenizer_config.json, and special_tokens_map.json after it, override the files
that it found in the folder, and takes any value as an argument of the tokenizer's class.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import transformers

from fxquant.errors import ModelError
from fxquant.files.doors import kind_of, printable, read_object
from fxquant.frontends.model_config import CONFIG, refuse_adapter

FULL: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
SPECIAL_TOKENS: Final = "special_tokens_map.json"
# Of which one lies beside every model that has a tokenizer.
TOKENIZER_FILES: Final = (
    FULL, TOKENIZER_CONFIG, "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
# What save_pretrained of some versions leaves there, and nothing reads.
_UNREAD: Final = frozenset({"special_tokens_map_file"})
_OBJECTS: Final = frozenset({"tokenizer_object", "__slow_tokenizer", "init_inputs"})
_EMPTY: Final[tuple[object, ...]] = (None, False, [], {}, "")
_TEXTS: Final = frozenset({"tokenizer_class", "padding_side", "truncation_side"})
_FLAGS: Final = frozenset(
    {
        *("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces"),
        *("split_special_tokens", "legacy", "do_lower_case"),
    }
)
# The last are what transformers 5 calls those without a class of their own.
_CLASSES: Final = (
    "Tokenizer", "TokenizerFast", "TokenizersBackend", "PythonBackend", "SentencePieceBackend",
)  # fmt: skip
_TOKENS: Final = frozenset(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


def holds_tokenizer(directory: Path) -> bool:
    """Whether files of a tokenizer lie in a folder, whatever they hold."""
    return bool(tokenizer_files(directory))


def tokenizer_files(directory: Path) -> tuple[str, ...]:
    """Names of a tokenizer's files in a folder; links that lead nowhere too."""
    return tuple(name for name in TOKENIZER_FILES if os.path.lexists(directory / name))


def check_tokenizer_files(directory: Path) -> None:
    """Raise ModelError for a folder without a tokenizer, or with one that would be read from
    anywhere else.

    Names file and field, also of a value of the wrong kind.
    """
    if not holds_tokenizer(directory):
        refuse_adapter(directory)
        raise ModelError(_missing(directory))
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        if (directory / name).exists():
            check_tokenizer_config(directory / name)


def _missing(directory: Path) -> str:
    if not (directory / CONFIG).exists():
        return (
            f"cannot load {directory}: it holds no model ({CONFIG}) and no tokenizer ({FULL}): "
            "save_pretrained of both writes them"
        )
    return (
        f"cannot load {directory}: it holds no tokenizer ({FULL}), which cuts the texts to "
        "calibrate and to evaluate on: tokenizer.save_pretrained writes one there (fxquant.save "
        "takes a tokenizer)"
    )


def check_tokenizer_config(path: Path) -> None:
    """Raise ModelError, naming the field, where a tokenizer's JSON file names another file or an
    object, or holds a value of the wrong kind."""
    data = read_object(path, ModelError)
    _check_kinds(path, data)
    for place, name, value in _fields(data):
        if name in _UNREAD or value in _EMPTY:
            continue
        if name.endswith(("_file", "_proto")):
            raise _elsewhere(path, place, "another file")
        if name in _OBJECTS:
            raise _elsewhere(path, place, "an object that no file holds")
        if name.endswith("_kwargs") and name != "sp_model_kwargs":
            raise _elsewhere(path, place, "options of another library")
        if name == "fast_tokenizer_files" and value != [FULL]:
            raise _elsewhere(path, place, f"files beside {FULL}")


def check_tokenizer_class(path: Path, name: object) -> None:
    """Raise ModelError for a class that is no tokenizer (transformers would build any of its own).

    A name that transformers has not is left to it: it needs the checkpoint's own code.
    """
    if name is None:
        return
    if not isinstance(name, str) or not name:
        raise ModelError(f"{path}: tokenizer_class must be a class's name, got {kind_of(name)}")
    if _is_known(name) and not name.endswith(_CLASSES):
        raise ModelError(f"{path}: tokenizer_class {printable(name)[:60]!r} is no tokenizer")


def _is_known(name: str) -> bool:
    """Whether transformers has the class, under this name or its fast or slow one's."""
    names = dir(transformers)
    return any(n in names for n in (name, f"{name}Fast", name.removesuffix("Fast")))


def _check_own_code(path: Path, data: Mapping[str, Any]) -> None:
    """Raise ModelError for a class that only code of the checkpoint has: transformers 5 takes one
    of its own instead, without a word."""
    own, name = data.get("auto_map"), data.get("tokenizer_class")
    if own is None:
        return
    if not isinstance(own, dict | list):
        raise _wrong(path, "auto_map", "an object", own)
    if isinstance(name, str) and not _is_known(name):
        raise ModelError(
            f"{path}: tokenizer_class {printable(name)[:60]!r} is custom code (auto_map), which "
            "fxquant does not run: take a tokenizer of a class that transformers has"
        )


def _fields(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(place, name, value) at any depth: what is nested is an argument of something too."""
    for name, value in data.items():
        yield f"{prefix}{printable(name)[:60]}", name, value
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{printable(name)[:60]}.")


def _check_kinds(path: Path, data: Mapping[str, Any]) -> None:
    check_tokenizer_class(path, data.get("tokenizer_class"))
    _check_own_code(path, data)
    for name, value in data.items():
        if value is None:
            continue
        if name in _TEXTS and not isinstance(value, str):
            raise _wrong(path, name, "text", value)
        if name in _FLAGS and not isinstance(value, bool):
            raise _wrong(path, name, "true or false", value)
        if name in _TOKENS and not isinstance(value, str | dict):
            raise _wrong(path, name, "a token's text or an object", value)
        if name in ("added_tokens_decoder", "sp_model_kwargs") and not isinstance(value, dict):
            raise _wrong(path, name, "an object", value)
        if name == "extra_special_tokens" and not isinstance(value, dict | list):
            raise _wrong(path, name, "an object", value)
        if name == "additional_special_tokens" and not isinstance(value, list):
            raise _wrong(path, name, "a list", value)
        if name == "model_max_length" and not _is_count(value):
            raise _wrong(path, name, "a number from 1", value)


def _is_count(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value >= 1


def _wrong(path: Path, name: str, wanted: str, value: object) -> ModelError:
    return ModelError(f"{path}: {name} must be {wanted}, got {kind_of(value)}")


def _elsewhere(path: Path, place: str, what: str) -> ModelError:
    return ModelError(
        f"{path}: {place} names {what}, which would take the place of the tokenizer in this "
        f"folder: remove {place}"
    )
