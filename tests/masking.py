"""What goldens do not hold: times and measured floats, and the widths that follow from them."""

import re

# "8." is no number, "8.5", "8e-05" and "8.5e-05%" are.
_FLOAT = re.compile(r"-?\b\d+(\.\d+(e[-+]\d+)?|e[-+]\d+)%?")


def masked(text: str) -> str:
    """``text`` with ``#`` for each float and range, every run of spaces or of dashes shortened.

    A number that is one digit longer widens its column, and the padding of all others with it.
    """
    text = re.sub(r"±\S+", "±#", _FLOAT.sub("#", text))
    text = re.sub(r"[-#\d]+\.\.[-#\d]+ (?=p|absmax|by)", "#..# ", text)
    return re.sub(r"-{2,}", "--", re.sub(r"(?<=\S) +", " ", text))
