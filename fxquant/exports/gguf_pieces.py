"""SentencePiece's BPE as llama.cpp runs it, beside BPE by merges: where both give the same ids.

llama.cpp writes ▁ for each space, joins two neighbours that are a token together, the best score
first, and falls back to bytes. A fast tokenizer joins what its merges name, by their ranks.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

SPACE: Final = "▁"
_BYTES: Final = tuple(f"<0x{number:02X}>" for number in range(256))
BYTES: Final = frozenset(_BYTES)
_UNRANKED: Final = 0.0


def marking_refusal(data: Any) -> str:
    """Why spaces come out otherwise in llama.cpp, "" where they do not; ``data``: tokenizer.json's
    content, of normalizers Prepend and Replace and of Metaspace alone."""
    normal = steps(data["normalizer"], "normalizers")
    split = steps(data["pre_tokenizer"], "pretokenizers")
    for step in normal:
        usual = (
            step["prepend"] == SPACE
            if step["type"] == "Prepend"
            else (step["pattern"], step["content"]) == ({"String": " "}, SPACE)
        )
        if not usual:
            return f"llama.cpp writes {SPACE} for a space and changes nothing else: {step}"
    if not split and all(step["type"] != "Replace" for step in normal):
        return f"it does not write {SPACE} for a space, which llama.cpp does"
    before = any(step["type"] == "Prepend" for step in normal)
    for step in split:
        if step["replacement"] != SPACE:
            return f"it writes {step['replacement']} for a space, and llama.cpp {SPACE}"
        scheme = step.get("prepend_scheme", "always")
        if scheme != "never" and not before:
            return (
                f"it puts {SPACE} before a text by the scheme {scheme} of Metaspace (none where a "
                "space stands there), and llama.cpp before each text and behind each special token"
            )
        if step.get("split", True) and any(SPACE in token[1:] for token in data["model"]["vocab"]):
            return "it splits at spaces first, and llama.cpp joins tokens across them"
    return ""


def puts_space_before(data: Any) -> bool:
    """Of a tokenizer that ``marking_refusal`` has nothing against."""
    return any(step["type"] == "Prepend" for step in steps(data["normalizer"], "normalizers"))


def ranked(data: Any) -> tuple[dict[str, int], str]:
    """The rank at which each token is made by the tokenizer's merges, and why llama.cpp, which has
    one score a token, would join others ("" where it would not)."""
    model = data["model"]
    missing = [token for token in _BYTES if token not in model["vocab"]]
    if missing:
        return {}, f"its vocabulary has no {missing[0]}, and llama.cpp falls back to all 256 bytes"
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    apart = {each["content"] for each in data["added_tokens"]} | BYTES
    found: dict[str, int] = {}
    for token in model["vocab"]:
        if len(token) < 2 or token in apart:
            continue
        # Neighbours that are a token together anywhere come to stand so in that token alone too.
        parts = _parts(token, ranks)
        if len(parts) != 2:
            continue
        rank = ranks.get((parts[0], parts[1]))
        if rank is None:
            return {}, (
                f"llama.cpp joins {parts[0]!r} and {parts[1]!r} to the token {token!r}, which its "
                "merges leave apart"
            )
        found[token] = rank
    return found, ""


def scores(tokens: list[str], ranks: dict[str, int]) -> tuple[float, ...]:
    """A token's score is the lower the later it is made, as SentencePiece's are."""
    last = max(ranks.values(), default=-1) + 1
    return tuple(
        _UNRANKED if len(token) > 1 and token not in ranks else -float(ranks.get(token, last))
        for token in tokens
    )


def _parts(token: str, ranks: dict[tuple[str, ...], int]) -> list[str]:
    """What the merges make of ``token``, but for the last two parts."""
    parts = list(token)
    while len(parts) > 2:
        named = [
            (ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in ranks
        ]
        if not named:
            break
        place = min(named)[1]
        parts[place : place + 2] = ["".join(parts[place : place + 2])]
    return parts


def steps(found: Any, name: str) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer, those of a sequence one by one."""
    if found is None:
        return []
    return list(found[name]) if found["type"] == "Sequence" else [found]
