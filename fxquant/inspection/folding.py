"""Remarks that are the same at many sites, as one with their number."""

from __future__ import annotations

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
    """(site, text) by text, in the order in which the texts first appear."""
    sites: dict[str, list[str]] = {}
    for site, text in entries:
        sites.setdefault(text, []).append(site)
    return [Remark(tuple(found), text) for text, found in sites.items()]
