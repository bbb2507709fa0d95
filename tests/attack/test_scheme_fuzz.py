"""Random schemes, right and damaged: read back as written, and converted to finite logits or
refused in one sentence. The seed, in each assertion, follows --seed, or is FXQUANT_FUZZ_SEED."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import torch
from torch.fx import GraphModule

import fxquant
from fxquant.errors import FxquantError, SchemeError
from fxquant.frontends.tracing import trace
from fxquant.recipes.repairs import REPAIRS
from fxquant.schemes.scheme import Scheme
from tests.architectures import opt, token_ids
from tests.attack.conftest import SeedOf

SEED = 20261127
VALUES = (
    "0", "1", "-1", "2", "4", "0.5", "0.7", "1e-3", "1e400", "-1e400", "1e308", "1e-400", "nan",
    "inf", "true", "false", "auto", "all", "block", "static", "minmax", "none", "007", "+3", "-0",
    "1_0", "0x10", "18446744073709551615", "18446744073709551616", "9" * 400, "1e", ".5", "5.",
    "1e5", "٣", "", "x-y.z", "1000", "1000000000",
)  # fmt: skip
NOISE = (
    *"w8a4-+/:(),=.{}\"' \t\n\0e_*g", "é", "٣", "1e400", "nan", "-g", "fp", "\ud800", "999999999",
)  # fmt: skip
PATTERNS = ("head", "embeddings", "matmul", "*", "*.fc2", "*.layers.0.*", "nothing", "", "[", "*q*")
OPTIONS = sorted({name for kind in REPAIRS.values() for name in kind.option_names()} | {"unknown"})


def random_site(rng: random.Random) -> str:
    grain = rng.choice(("", "", "-tensor", "-g8", "-g16", "-g128", "-g1", "-g0", "-g999999999"))
    text = f"w{rng.choice((2, 3, 4, 8, 8, 8, 1, 9))}{grain}{rng.choice(('', '', '-asym'))}"
    if rng.random() < 0.3:
        return text
    kind = rng.choice(("-dynamic", "-dynamic-token", "-static", "-static-token"))
    estimator = rng.choice(("", "", ":absmax", ":mse", ":entropy", ":p99.9", ":p50", ":p1e400"))
    slash = "" if text[1:].isdigit() else "/"
    bits = rng.choice((8, 8, 4, 2, 16))
    return f"{text}{slash}a{bits}{kind}{rng.choice(('', '-asym'))}{estimator}"


def random_repair(rng: random.Random) -> str:
    name = rng.choice((*REPAIRS, *REPAIRS, "unknown"))
    own = REPAIRS[name].option_names() if name in REPAIRS else ()
    count = rng.choice((0, 0, 1, 1, 2))
    pool = own if own and rng.random() < 0.8 else OPTIONS
    options = [f"{rng.choice(pool)}={rng.choice(VALUES)}" for _ in range(count)]
    return name + (f"({','.join(options)})" if options else "")


def random_scheme(rng: random.Random) -> str:
    base = random_site(rng) if rng.random() < 0.85 else rng.choice(("fp", "fp32-gemm"))
    repairs = [random_repair(rng) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    text = "+".join((base, *repairs))
    if rng.random() < 0.2:
        chosen = rng.sample(PATTERNS, rng.choice((0, 1, 2)))
        overrides = {pattern: rng.choice(("fp", random_site(rng))) for pattern in chosen}
        text = json.dumps({"scheme": text, "overrides": overrides})
    if rng.random() < 0.3:
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice((*NOISE, "")) + text[at + rng.choice((0, 1, 2)) :]
    return text


def parsed(text: str, where: str) -> Scheme | None:
    """The scheme, which its own text must give again; None where it is refused, with its place."""
    try:
        scheme = Scheme.parse(text)
    except SchemeError:
        return None
    assert Scheme.parse(str(scheme)) == scheme, where
    assert str(Scheme.parse(str(scheme))) == str(scheme), where
    assert Scheme.from_json(scheme.to_json()) == scheme, where
    return scheme


def test_what_is_read_is_written_and_read_again(seed_of: SeedOf) -> None:
    seed = seed_of(SEED)
    rng, counts = random.Random(seed), Counter[bool]()
    for index in range(2000):
        text = random_scheme(rng)
        counts[parsed(text, f"seed {seed}, scheme {index}: {text!r}") is not None] += 1
    print(f"seed {seed}: {counts[True]} read, {counts[False]} refused, 0 wrong")
    assert min(counts.values()) > 200


@pytest.fixture(scope="module")
def graph() -> GraphModule:
    return trace(opt(num_hidden_layers=1))


def outcome(graph: GraphModule, text: str, where: str) -> str:
    batches = [token_ids(2, 8), token_ids(1, 5, seed=3)]
    scheme = parsed(text, where)
    if scheme is None:
        return "no scheme"
    try:
        converted = fxquant.convert(graph, scheme, calibration=batches)
    except FxquantError:
        return "refused"
    except Exception as error:
        raise AssertionError(f"{where}: {error!r}") from error
    with torch.no_grad():
        logits = converted(input_ids=batches[0])
    assert logits.shape == (2, 8, 128), where
    assert bool(torch.isfinite(logits).all()), where
    return "right"


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_converted_to_finite_logits_or_refused(
    count: int, graph: GraphModule, seed_of: SeedOf
) -> None:
    seed = seed_of(SEED) + count
    rng, counts = random.Random(seed), Counter[str]()
    for index in range(count):
        text = random_scheme(rng)
        where = f"seed {seed}, scheme {index}: {text!r}"
        counts[outcome(graph, text, where)] += 1
    print(f"seed {seed}: {count} tried, {dict(counts)}, 0 wrong")
    assert count < 1000 or min(counts["right"], counts["refused"]) > count // 20  # of many
