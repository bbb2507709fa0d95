"""What goldens do not hold: times and measured floats, and the widths that follow from them."""

import re

_FLOAT = re.compile(r"-?\d+\.\d+(e[-+]\d+)?%?")


def masked(text: str) -> str:
    """``text`` with ``#`` for each float, runs of spaces and rules shortened."""
    text = re.sub(r"±\S+", "±#", _FLOAT.sub("#", text))
    text = re.sub(r"\| +#", "| #", text)  # as wide as the longest time
    return re.sub(r"-{3,}", "---", re.sub(r"(?<=\S) {2,}", "  ", text))
