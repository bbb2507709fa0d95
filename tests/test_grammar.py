"""docs/schemes.md has the grammar: texts are made from it, and read by the code."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fxquant.errors import SpellingError
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.spelling import ALIASES

TOKEN = re.compile(r'"[^"]*"|[a-z]+|[][(){}|]')
CLOSING = {"(": ")", "[": "]", "{": "}"}
# What the page says in words.
WORDS: dict[str, Callable[[random.Random], str]] = {
    "bits": lambda r: str(r.randint(2, 8)),
    "size": lambda r: str(r.choice((1, 16, 32, 128, 100))),
    "percent": lambda r: r.choice(("99.9", "100", "50.5", "99.99")),
    "name": lambda r: r.choice(("smooth", "gptq", "kv8", "split_outliers")),
    "option": lambda r: r.choice(("alpha", "where", "steps")) + str(r.randint(0, 10**6)),
    "value": lambda r: r.choice(("0.5", "-3", "true", "all", "1e-05")),
    "alias": lambda r: r.choice(list(ALIASES)),
}
WELL = re.compile(r"[-+/:]")


def rules() -> dict[str, list[str]]:
    """Tokens of each rule of the page's first block; what stands behind two spaces is a remark."""
    page = (Path(__file__).parents[1] / "docs" / "schemes.md").read_text()
    found = {}
    for line in page.split("```")[1].strip().splitlines():
        name, _, body = line.partition("=")
        found[name.strip()] = TOKEN.findall(re.split(r" {2,}", body.strip())[0])
    return {name: body for name, body in found.items() if name not in WORDS}


RULES = rules()


def sentence(tokens: list[str], r: random.Random) -> str:
    """A text that the tokens allow."""
    choices: list[list[str]] = [[]]
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if token == "|":
            choices.append([])
        elif token in CLOSING:
            end = matching(tokens, position - 1)
            inner, position = tokens[position:end], end + 1
            times = {"(": 1, "[": r.randint(0, 1), "{": r.randint(0, 2)}[token]
            choices[-1] += [sentence(inner, r) for _ in range(times)]
        elif token.startswith('"'):
            choices[-1].append(token[1:-1])
        else:
            choices[-1].append(WORDS[token](r) if token in WORDS else sentence(RULES[token], r))
    return "".join(r.choice(choices))


def matching(tokens: list[str], start: int) -> int:
    depth = 0
    for place in range(start, len(tokens)):
        depth += (tokens[place] in CLOSING) - (tokens[place] in CLOSING.values())
        if not depth:
            return place
    raise AssertionError(f"no end of {tokens[start:]}")


def texts(count: int) -> Iterator[str]:
    r = random.Random(torch.initial_seed())
    yield from (sentence(RULES["scheme"], r) for _ in range(count))


def test_every_rule_is_used() -> None:
    named = {token for body in RULES.values() for token in body if token.isalpha()}
    assert named <= {*RULES, *WORDS}
    assert set(RULES) - named == {"scheme"}
    assert len(RULES) > 10


def test_what_the_grammar_makes_is_read_and_printed_back() -> None:
    seen = set()
    for text in texts(3000):
        scheme = Scheme.parse(text)
        assert Scheme.parse(str(scheme)) == scheme, text
        seen.add(re.sub(r"[0-9]+", "", text.partition("+")[0]))
    assert len(seen) > 100


@pytest.mark.parametrize("strange", ["?", " ", "-asym-asym"])
def test_the_caret_stands_where_a_text_goes_wrong(strange: str) -> None:
    """At the part that something was put into; what stands in front of it is fine."""
    r = random.Random(torch.initial_seed())
    for text in texts(1000):
        if text.startswith(("fp", *ALIASES)):
            continue
        place = r.randrange(1, len(text.partition("+")[0]))
        spoiled = text[:place] + strange + text[place:]
        try:
            Scheme.parse(spoiled)
        except SpellingError as error:
            said = str(error).splitlines()
            assert said[1] == f"  {spoiled}"
            caret = said[2].index("^") - 2
            assert caret <= place + len("-asym"), spoiled
            assert not WELL.search(spoiled[caret + 1 : place]), (spoiled, said)
        else:
            assert strange == " ", spoiled  # is there one that takes a space?


@pytest.mark.parametrize("text", ["wfp8-static", "w4-g16-e8m0-asym", "w8/a8-dynamic-g16-asym"])
def test_what_the_grammar_leaves_out_is_refused_at_its_place(text: str) -> None:
    with pytest.raises(SpellingError) as caught:
        Scheme.parse(text)
    caret = str(caught.value).splitlines()[2].index("^") - 2
    assert text[caret:].lstrip("-") in ("static", "asym")
