"""kv4: keys and values as a cache of 4 bits gives them back."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.formats.grid import Grid
from fxquant.formats.integer import integer
from fxquant.passes.kv8 import StoresCache


@dataclass(frozen=True)
class Kv4(StoresCache):
    """``kv8`` with 4 bits, integers."""

    name = "kv4"

    @property
    def grid(self) -> Grid:
        return integer(4)
