"""Tokens that a tokenizer takes out of a text before all else, and what llama.cpp makes of them.

A fast tokenizer takes the first that there is, the longest at its place; llama.cpp takes all
that there are of the longest, then of the next. It knows no flags of theirs.
"""

from __future__ import annotations

import re
from typing import Any, Final

_FLAGS: Final = ("lstrip", "rstrip", "single_word")


def added_refusal(data: Any, marked: bool) -> str:
    """Why llama.cpp would take other tokens out of a text, "" where it would not.

    ``data``: tokenizer.json's content; ``marked``: its normalizer puts marks into a text.
    """
    for each in data["added_tokens"]:
        for flag in _FLAGS:
            if each[flag]:
                return f"its token {each['content']!r} has {flag}, which llama.cpp does not know"
        if marked and each["normalized"]:
            return (
                f"its token {each['content']!r} is sought in the text with its marks of spaces "
                "(normalized), and llama.cpp seeks it in the text as it is"
            )
    return _overlap([each["content"] for each in data["added_tokens"] if each["content"]])


def _overlap(contents: list[str]) -> str:
    """A text of two tokens that overlap, of which llama.cpp would take the other."""
    order = sorted(contents, key=lambda each: -len(each.encode()))
    first = re.compile("|".join(re.escape(each) for each in sorted(contents, key=len)[::-1]))
    begins: dict[str, list[str]] = {}
    for each in contents:
        for end in range(1, len(each)):
            begins.setdefault(each[:end], []).append(each)
    for each in contents:
        for start in range(1, len(each)):
            for other in begins.get(each[start:], ()):
                text = each[:start] + other
                if first.findall(text) != _taken(text, order):
                    return (
                        f"its tokens {each!r} and {other!r} overlap, and llama.cpp takes the other"
                    )
    return ""


def _taken(text: str, order: list[str]) -> list[str]:
    for number, each in enumerate(order):
        if each in text:
            left, _, right = text.partition(each)
            return [*_taken(left, order[number + 1 :]), each, *_taken(right, order[number:])]
    return []
