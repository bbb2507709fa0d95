"""English prose that every CPython carries: the topics of `help()`, in three disjoint splits.

Nothing is downloaded, so tests and demonstrations have real text on any machine.
"""

from collections import defaultdict
from collections.abc import Mapping
from pydoc_data.topics import topics as _pydoc_topics
from typing import Final, Literal, get_args

Split = Literal["train", "calibration", "evaluation"]

# Named rather than drawn: a topic keeps its split when another Python version adds or drops topics.
# Each list mixes the language reference, the data model and the library reference.
_HELD_OUT: Final[Mapping[Split, tuple[str, ...]]] = {
    "evaluation": (
        "assignment",
        "binary",
        "booleans",
        "execmodel",
        "global",
        "objects",
        "raise",
        "strings",
        "typesseq",
    ),
    "calibration": (
        "assert",
        "calls",
        "comparisons",
        "debugger",
        "identifiers",
        "import",
        "return",
        "slicings",
        "specialattrs",
        "string-methods",
    ),
}

# Shorter repetitions (headings, one-line grammar rules) are the common idiom of the whole text.
_SHARED_PARAGRAPH: Final = 80


def builtin_text(split: Split) -> str:
    """The text of one split of CPython's `help()` topics (`pydoc_data.topics`).

    Topics stand whole, in alphabetical order, joined by an empty line. Topics that repeat one
    another's paragraphs are kept in one split, so that no paragraph of more than 80 characters
    occurs in two. The text is the same on every run of one Python version; another version has
    other text, so record its hash beside a result.

    Args:
        split: "train" (about 300 kB), "calibration" or "evaluation" (about 80 kB each, roughly
            40 windows of 512 tokens under a tokenizer of four characters a token).

    Returns:
        The text, without a newline at either end.

    Raises:
        ValueError: `split` is none of the three.

    The text is from the Python documentation, (c) Python Software Foundation, PSF licence.
    """
    if split not in get_args(Split):
        known = ", ".join(get_args(Split))
        raise ValueError(f"unknown split {split!r} of the built-in text; known: {known}")
    splits = _assign_splits(_pydoc_topics)
    return "\n\n".join(
        _pydoc_topics[topic].strip() for topic in sorted(splits) if splits[topic] == split
    )


def _assign_splits(topics: Mapping[str, str]) -> dict[str, Split]:
    """Topic -> split; a group of related topics follows its held-out member, else it is "train"."""
    splits: dict[str, Split] = {}
    for group in _related_topics(topics):
        held_out = (name for name, members in _HELD_OUT.items() if group & set(members))
        splits.update(dict.fromkeys(group, next(held_out, "train")))
    return splits


def _related_topics(topics: Mapping[str, str]) -> list[set[str]]:
    """Groups of topics that are connected by a paragraph they share."""
    holders: dict[str, set[str]] = defaultdict(set)
    for topic, text in topics.items():
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) > _SHARED_PARAGRAPH:
                holders[words].add(topic)

    group_of = {topic: {topic} for topic in topics}
    for sharing in holders.values():
        merged = set[str]().union(*(group_of[topic] for topic in sharing))
        group_of.update(dict.fromkeys(merged, merged))
    return [group_of[topic] for topic in sorted(topics) if topic == min(group_of[topic])]
