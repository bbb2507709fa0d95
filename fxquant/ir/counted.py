"""A count with its noun, as sentences have it."""


def counted(number: int, noun: str, more: str = "") -> str:
    """Such as "1 window" and "2 windows"; ``more``: the plural where it is not the noun and s."""
    return f"{number} {noun if number == 1 else more or f'{noun}s'}"


def part_of(number: int, whole: int, noun: str, more: str = "") -> str:
    """Subject and verb of a sentence: "1 of the 8 windows holds", "3 of the 8 windows hold"."""
    return f"{number} of the {counted(whole, noun, more)} hold{'s' if number == 1 else ''}"
