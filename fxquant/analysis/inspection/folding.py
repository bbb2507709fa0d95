"""Remarks that are the same at many sites, as one with their number."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Remark:
    """``text`` of all ``sites``, in the order in which they stand."""

    sites: tuple[str, ...]
    text: str

    @property
    def where(self) -> str:
        """One site or two by name, of more the two ends and how many."""
        if len(self.sites) <= 2:
            return ", ".join(self.sites)
        return f"{self.sites[0]} … {self.sites[-1]} ({len(self.sites)} sites)"

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def fold(entries: Iterable[tuple[str, str]]) -> list[Remark]:
    """(site, text) by text, in the order in which the texts first appear.

    Texts that name the site's own block by its number are alike in all blocks: of several such the
    remark has ``*`` for the number.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for site, text in entries:
        groups.setdefault(_of_any_block(site, text), []).append((site, text))
    return [
        Remark(tuple(site for site, _ in found), found[0][1] if len(found) == 1 else text)
        for text, found in groups.items()
    ]


def _of_any_block(site: str, text: str) -> str:
    """``text`` with ``*`` in place of the number of the block that ``site`` stands in."""
    block = re.match(r"(.*?\.)\d+\.", site)
    return text if block is None else text.replace(block[0], f"{block[1]}*.")
