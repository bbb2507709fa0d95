"""A tokenizer as GGUF keeps it: tokens, their kinds, merges or scores, what surrounds a text.

llama.cpp has two kinds that models of Llama's shape use: byte-level BPE ("gpt2", merges, and the
name of the rule that splits a text first) and SentencePiece's BPE ("llama", a score a token). Both
are read from what ``tokenizer.json`` says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.errors import ExportError

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPACE: Final = "▁"
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
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    chat_template: str | list[dict[str, str]] | None


def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """Raises ExportError for a tokenizer that llama.cpp has no form for; ``size``: rows of the
    embedding, of which those without a token are called [PAD...]."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(tokenizer, "it is a slow one, without a tokenizer.json")
    data = json.loads(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise _refused(tokenizer, f"its model is {model['type']}, and GGUF's for Llama are BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refused(tokenizer, f"its {name} ({model[name]!r}) has no place there")
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= size:
        raise _refused(
            tokenizer, f"it has ids up to {max(ids.values())}, the model {size} embeddings"
        )
    tokens = [f"[PAD{number}]" for number in range(size)]
    for token, number in ids.items():
        tokens[number] = token
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    by_bytes = not model.get("byte_fallback") or "ByteLevel" in _kinds(data)
    if not by_bytes:
        _check_pieces(tokenizer, data)
    around = tokenizer("a", verbose=False)["input_ids"]
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    return Vocabulary(
        model="gpt2" if by_bytes else "llama",
        pre=_pre(tokenizer, data) if by_bytes else "default",
        tokens=tuple(tokens),
        types=_types(data, tokens, set(ids.values()), None if by_bytes else tokenizer.unk_token_id),
        scores=() if by_bytes else _scores(tokens, merges),
        merges=tuple(merges),
        special=_special(tokenizer),
        adds_bos=len(around) > len(bare) and around[0] == tokenizer.bos_token_id,
        adds_eos=len(around) > len(bare) and around[-1] == tokenizer.eos_token_id,
        adds_space=tokens[bare[0]].startswith(_SPACE),
        chat_template=_template(tokenizer),
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
    return [{"name": name, "template": text} for name, text in found.items()]


def _types(data: Any, tokens: list[str], known: set[int], unknown: int | None) -> tuple[int, ...]:
    added = {each["id"]: each["special"] for each in data["added_tokens"]}

    def kind(number: int, token: str) -> int:
        if number not in known:
            return _UNUSED
        if number == unknown:
            return _UNKNOWN
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return _BYTE
        if number in added:
            return _CONTROL if added[number] else _USER
        return _NORMAL

    return tuple(kind(number, token) for number, token in enumerate(tokens))


def _scores(tokens: list[str], merges: list[str]) -> tuple[float, ...]:
    """A token's score is the lower the later it may be merged, as SentencePiece's are."""
    rank: dict[str, int] = {}
    for merge in merges:
        rank.setdefault(merge.replace(" ", "", 1), len(rank))
    last = len(rank)
    return tuple(
        0.0 if len(token) > 1 and token not in rank else -float(rank.get(token, last))
        for token in tokens
    )


def _pre(tokenizer: Tokenizer, data: Any) -> str:
    """llama.cpp's name for what splits a text before BPE."""
    steps, kinds, normal = _steps(data["pre_tokenizer"]), _kinds(data), _normalizers(data)
    split = kinds == ("Split", "ByteLevel")
    by_bytes = [step for step in steps if step["type"] == "ByteLevel"]
    # What splits comes once: by a pattern of its own, or by that of ByteLevel.
    plain = all(not s["add_prefix_space"] and s["use_regex"] is not split for s in by_bytes)
    digits = all(step.get("individual_digits", True) for step in steps)
    whole = bool(data["model"].get("ignore_merges"))
    if plain and digits and not normal and not whole and kinds in _BY_KINDS:
        return _BY_KINDS[kinds]
    if split and plain and normal in ((), ("NFC",)):
        pattern, isolated = steps[0]["pattern"].get("Regex", ""), steps[0]["behavior"] == "Isolated"
        if isolated and not steps[0]["invert"] and (pattern, whole) in _BY_SPLIT:
            return _BY_SPLIT[pattern, whole]
    raise _split(tokenizer, data)


def _check_pieces(tokenizer: Tokenizer, data: Any) -> None:
    """Raise ExportError for what SentencePiece's BPE does not do to a text first."""
    known = _kinds(data) in ((), ("Metaspace",)) and set(_normalizers(data)) <= _MARKING
    if not known or data["model"].get("ignore_merges"):
        raise _split(tokenizer, data)


def _split(tokenizer: Tokenizer, data: Any) -> ExportError:
    whole = ("ignore_merges",) if data["model"].get("ignore_merges") else ()
    kinds = " and ".join((*_normalizers(data), *_kinds(data), *whole)) or "none"
    return _refused(
        tokenizer,
        "llama.cpp has no name that is known here for its way to normalize and split a text first "
        f"({kinds}, as its tokenizer.json sets them)",
    )


def _normalizers(data: Any) -> tuple[str, ...]:
    found = data["normalizer"]
    if found is None:
        return ()
    parts = found["normalizers"] if found["type"] == "Sequence" else [found]
    return tuple(part["type"] for part in parts)


def _kinds(data: Any) -> tuple[str, ...]:
    return tuple(step["type"] for step in _steps(data["pre_tokenizer"]))


def _steps(found: Any) -> list[Any]:
    if found is None:
        return []
    return list(found["pretokenizers"]) if found["type"] == "Sequence" else [found]


def _refused(tokenizer: Tokenizer, reason: str) -> ExportError:
    return ExportError(
        f"gguf cannot hold the tokenizer {tokenizer.name_or_path}: {reason}; leave the tokenizer "
        "out (--no-tokenizer; from Python no tokenizer=), or take another format (--to onnx)"
    )
