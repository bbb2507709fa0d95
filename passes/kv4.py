"""kv4: keys and values as a cache of 4 bits gives them back."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.passes.kv8 import Kv8


@dataclass(frozen=True)
class Kv4(Kv8):
    """``kv8`` with 4 bits."""

    name = "kv4"
    bits = 4
