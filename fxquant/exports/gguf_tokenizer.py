"""A tokenizer as GGUF keeps it: tokens, their kinds, merges or scores, what surrounds a text.

llama.cpp has two kinds that models of Llama's shape use: byte-level BPE ("gpt2", merges, and the
name of the rule that splits a text first) and SentencePiece's BPE ("llama", a score a token). Both
are read from what ``tokenizer.json`` says.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import pre_tokenizers
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.errors import ExportError
from fxquant.exports.gguf_added import added_refusal
from fxquant.exports.gguf_ends import other_ends
from fxquant.exports.gguf_pieces import (
    BYTES,
    marking_refusal,
    puts_space_before,
    ranked,
    scores,
    steps,
)

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_LETTERS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What splits a text before BPE, whether a part that is a token stays whole, whatever its merges
# make of it, and llama.cpp's name for both.
_BY_SPLIT: Final = {
    (_LETTERS % "{1,3}", True): "llama-bpe",
    (_LETTERS % "{1,3}", False): "smaug-bpe",
    (_LETTERS % "", False): "qwen2",
}
# Characters that have among them each byte of UTF-8 below U+40000, but for control characters.
_USUAL: Final = (
    *(9, 10, 13, *range(0x20, 0x7F), *range(0x80, 0x800), 0x800),
    *(*range(0x1000, 0xD800, 0x1000), 0xE000, 0xF000, 0x10000),
)
_MARKING: Final = {"Prepend", "Replace"}  # of spaces, where SentencePiece's BPE is a fast one
_BY_KINDS: Final = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of the tokenizer.

    Attributes:
        model: "gpt2" or "llama".
        pre: llama.cpp's name of what splits a text first.
        tokens, types, scores: one a row of the embedding; scores of "llama" only.
        merges: of two tokens, "a b", in the order of their ranks.
        special: ids by name: bos, eos, unknown, padding.
        ends: ids at which the model stops besides, up to two.
        adds_bos, adds_eos, adds_space: what stands around and before a text's own tokens.
        chat_template: one, or several by name; None where it has none.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    special: dict[str, int]
    ends: tuple[int, ...]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    chat_template: str | list[dict[str, str]] | None


def vocabulary(
    tokenizer: Tokenizer,
    size: int,
    config: dict[str, Any] | None = None,
    generation: GenerationConfig | None = None,
) -> Vocabulary:
    """Raises ExportError for a tokenizer that llama.cpp has no form for; ``size``: rows of the
    embedding, of which those without a token are called [PAD...]; ``config`` of the model and
    ``generation``: where it stops."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(tokenizer, "it is a slow one, without a tokenizer.json")
    data = json.loads(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise _refused(tokenizer, f"its model is {model['type']}, and GGUF's for Llama are BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise _refused(tokenizer, f"its {name} ({model[name]!r}) has no place there")
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= size:
        raise _refused(
            tokenizer, f"it has ids up to {max(ids.values())}, the model {size} embeddings"
        )
    tokens = _tokens(ids, size)
    by_bytes = not model.get("byte_fallback") or "ByteLevel" in _kinds(data)
    pre = _pre(tokenizer, data) if by_bytes else "default"
    if by_bytes:
        _check_bytes(tokenizer, data)
    ranks = {} if by_bytes else _ranks(tokenizer, data)
    reason = added_refusal(data, not by_bytes and bool(data["normalizer"]))
    if reason:
        raise _refused(tokenizer, reason)
    adds_bos, adds_eos = _around(tokenizer)
    return Vocabulary(
        model="gpt2" if by_bytes else "llama",
        pre=pre,
        tokens=tuple(tokens),
        types=_types(data, tokens, set(ids.values()), tokenizer.unk_token_id, not by_bytes),
        scores=() if by_bytes else scores(tokens, ranks),
        merges=tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"]),
        special=_special(tokenizer),
        ends=other_ends(tuple(tokens), tokenizer.eos_token_id, config or {}, generation),
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        adds_space=not by_bytes and puts_space_before(data),
        chat_template=_template(tokenizer),
    )


def _tokens(ids: dict[str, int], size: int) -> list[str]:
    """By their ids; a row that has no token gets a name that no token has."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    for number in range(size):
        while tokens[number] in ids:
            tokens[number] = f"[{tokens[number]}]"
    for token, number in ids.items():
        tokens[number] = token
    return tokens


def _around(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Whether a bos stands before a text's tokens, and an eos behind them."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise _refused(tokenizer, "it has no eos_token, and llama.cpp then takes one by its number")
    found = tokenizer("a", verbose=False)["input_ids"]
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    for before, behind in ((False, False), (True, False), (False, True), (True, True)):
        if found == [*[bos] * before, *bare, *[eos] * behind]:
            return before, behind
    raise _refused(
        tokenizer,
        f"around a text it puts {tokenizer.convert_ids_to_tokens(found)}, and llama.cpp one bos "
        f"({tokenizer.bos_token}) before and one eos ({tokenizer.eos_token}) behind it",
    )


def _special(tokenizer: Tokenizer) -> dict[str, int]:
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    return {name: number for name, number in found.items() if number is not None}


def _template(tokenizer: Tokenizer) -> str | list[dict[str, str]] | None:
    found: str | dict[str, str] | None = tokenizer.chat_template
    if not isinstance(found, dict):
        return found
    written = [re.sub("[^A-Za-z0-9]", "_", name) for name in found]  # as the gguf package does
    for name, other in zip(found, written, strict=True):
        if written.count(other) > 1:
            raise _refused(tokenizer, f"its chat template {name!r} and another are {other!r} there")
    return [{"name": name, "template": text} for name, text in found.items()] or None


def _types(
    data: Any, tokens: list[str], known: set[int], unknown: int | None, pieces: bool
) -> tuple[int, ...]:
    added = {each["id"]: each["special"] for each in data["added_tokens"]}

    def kind(number: int, token: str) -> int:
        if number not in known:
            return _UNUSED
        if pieces and number == unknown:
            return _UNKNOWN
        if pieces and token in BYTES:
            return _BYTE
        if number in added:
            return _CONTROL if added[number] else _USER
        return _NORMAL

    return tuple(kind(number, token) for number, token in enumerate(tokens))


def _pre(tokenizer: Tokenizer, data: Any) -> str:
    """llama.cpp's name for what splits a text before BPE."""
    parts, kinds, normal = _splits(data), _kinds(data), _normalizers(data)
    split = kinds == ("Split", "ByteLevel")
    by_bytes = [step for step in parts if step["type"] == "ByteLevel"]
    # What splits comes once: by a pattern of its own, or by that of ByteLevel.
    plain = all(not s["add_prefix_space"] and s["use_regex"] is not split for s in by_bytes)
    digits = all(step.get("individual_digits", True) for step in parts)
    whole = bool(data["model"].get("ignore_merges"))
    if plain and digits and not normal and not whole and kinds in _BY_KINDS:
        return _BY_KINDS[kinds]
    if split and plain and normal in ((), ("NFC",)):
        pattern, isolated = parts[0]["pattern"].get("Regex", ""), parts[0]["behavior"] == "Isolated"
        if isolated and not parts[0]["invert"] and (pattern, whole) in _BY_SPLIT:
            return _BY_SPLIT[pattern, whole]
    raise _split(tokenizer, data)


def _check_bytes(tokenizer: Tokenizer, data: Any) -> None:
    """Raise ExportError for what llama.cpp does not do with bytes behind the split."""
    model = data["model"]
    if not model["merges"]:
        raise _refused(tokenizer, "it has no merges, and llama.cpp loads no BPE without them")
    usual = "".join(map(chr, _USUAL))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    written = {each for part, _ in by_bytes.pre_tokenize_str(usual) for each in part}
    missing = sorted(written - set(model["vocab"]))
    if missing:
        raise _refused(
            tokenizer,
            f"{missing[0]!r}, a byte of usual text, is no token, and where one is missing "
            "llama.cpp joins others than it",
        )


def _ranks(tokenizer: Tokenizer, data: Any) -> dict[str, int]:
    """The rank of each token. Raises ExportError for what SentencePiece's BPE does not do."""
    known = _kinds(data) in ((), ("Metaspace",)) and set(_normalizers(data)) <= _MARKING
    if not known or data["model"].get("ignore_merges"):
        raise _split(tokenizer, data)
    reason = marking_refusal(data)
    ranks, other = ({}, "") if reason else ranked(data)
    if reason or other:
        raise _refused(tokenizer, reason or other)
    return ranks


def _split(tokenizer: Tokenizer, data: Any) -> ExportError:
    whole = ("ignore_merges",) if data["model"].get("ignore_merges") else ()
    kinds = " and ".join((*_normalizers(data), *_kinds(data), *whole)) or "none"
    return _refused(
        tokenizer,
        "llama.cpp has no name that is known here for its way to normalize and split a text first "
        f"({kinds}, as its tokenizer.json sets them)",
    )


def _normalizers(data: Any) -> tuple[str, ...]:
    return tuple(step["type"] for step in steps(data["normalizer"], "normalizers"))


def _kinds(data: Any) -> tuple[str, ...]:
    return tuple(step["type"] for step in _splits(data))


def _splits(data: Any) -> list[Any]:
    return steps(data["pre_tokenizer"], "pretokenizers")


def _refused(tokenizer: Tokenizer, reason: str) -> ExportError:
    name = f"the tokenizer {tokenizer.name_or_path}".rstrip()
    return ExportError(
        f"gguf cannot hold {name}: {reason}; leave the tokenizer out "
        "(--no-tokenizer; from Python no tokenizer=), or take another format (--to onnx)"
    )
