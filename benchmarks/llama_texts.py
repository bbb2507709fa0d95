"""Texts that tokenizers differ on: lines of prose, odd ones by hand, and random ones."""

from __future__ import annotations

import random
from typing import Final

from fxquant.evaluation.builtin_text import builtin_text

TEXTS: Final = (
    *("", " ", "  ", "\n", "\n\n \t x", "a", " a", "a ", "  a  b   c", "a\n\nb", "x\r\ny\r"),
    *("it's IT'S we'll 'S", "1234567 ٣٤٥ ①②", "1e-5 v2.0.1 0x1F", "日本語テキスト", "한국어 ไทย"),
    *("مرحبا بالعالم", "नमस्ते", "e\u0301 é n\u0303 ñ", "👩\u200d👩\u200d👧 🏳️\u200d🌈", "ﬁ Ⅳ ½"),
    *("\u200b\u00a0x\u2003y\ufeff", "\x01\x7f", "\U0010fffd\ufffd", "▁a ▁", "Ġa"),
    *("<s>a</s> <unk>b", " <s> a", "a<|im_start|>user\nhi<|im_end|> <|endoftext|>"),
    "def f(x):\n    return x  # ok\n",
)
_POOLS: Final = (
    *("abc XYZ'sdtm", " \n\t\r\u00a0\u3000", "0123456789", "éüñßΩжш日本語ไทย한국"),
    "!?.,;:-_()[]{}<>|/\\'\"",
)


def lines(count: int = 300) -> list[str]:
    """The first lines of the built-in text."""
    return [line for line in builtin_text("evaluation").splitlines() if line.strip()][:count]


def random_texts(count: int = 300, seed: int = 0) -> list[str]:
    """Up to 40 characters each, from pools of letters, spaces, digits and marks, and from all that
    Unicode has between U+0020 and U+1FFFF but surrogates."""
    source = random.Random(seed)

    def character() -> str:
        pool = source.choice((*_POOLS, "", ""))
        if pool:
            return source.choice(pool)
        low, high = source.choice(((0x20, 0xD800), (0xE000, 0x20000)))
        return chr(source.randrange(low, high))

    return ["".join(character() for _ in range(source.randrange(1, 41))) for _ in range(count)]
