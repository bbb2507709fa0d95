"""Seeds of the random sets, which follow ``--seed`` like all random inputs of the tests."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

SeedOf = Callable[[int], int]


@pytest.fixture
def seed_of(request: pytest.FixtureRequest) -> SeedOf:
    """From a set's usual seed, which it has under ``--seed 0``, the one of this run.

    FXQUANT_FUZZ_SEED takes the place of the usual one: what a failing assertion names, less the
    count that some sets add.
    """
    given = os.environ.get("FXQUANT_FUZZ_SEED")
    moved = int(request.config.option.seed)
    # Some sets are of thousands of seeds in a row.
    return lambda usual: usual + 100_000 * moved if given is None else int(given)
