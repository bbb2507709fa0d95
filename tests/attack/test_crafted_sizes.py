"""Checkpoints whose size arithmetic is harmless at the lengths that are tried, not at others."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import fxquant
from fxquant.errors import CheckpointError
from tests.architectures import llama
from tests.attack.mutations import write
from tests.attack.watch import watched

FUNCTION, METHOD = "call_function", "call_method"
IDS = {"node": "input_ids"}
LENGTH = [METHOD, "s", "size", [IDS, 1]]


def node(name: str) -> dict[str, str]:
    return {"node": name}


def written(*items: Any) -> dict[str, Any]:
    return {"tuple": list(items)}


def call(name: str, target: str, *args: Any) -> list[Any]:
    return [FUNCTION, name, target, list(args)]


def doubled(source: str, name: str, times: int) -> list[list[Any]]:
    """Nodes that join a tuple with itself ``times`` times; the last is ``name``."""
    names = [source, *(f"{name}{i}" for i in range(times - 1)), name]
    return [
        call(new, "operator.add", node(old), node(old)) for old, new in itertools.pairwise(names)
    ]


BEHIND = [LENGTH, call("d", "operator.sub", node("s"), 5)]  # 0 at the first length
ZEROS = [
    LENGTH,
    call("z", "torch.zeros", node("s")),
    call("w", "torch.zeros", 600),
    call("even", "torch.zeros", 64 * 5 * 7 * 9),
]
UNEVEN = "node .*sizes of a saved graph grow evenly"
CRAFTED: dict[str, tuple[list[list[Any]], str]] = {
    "pow": ([*BEHIND, call("bomb", "operator.pow", 10, node("d"))], "bomb.*sizes are added"),
    "pow of products": (
        [
            *BEHIND,
            call("k", "operator.mul", node("d"), 10**8),
            call("b", "operator.pow", 10, node("k")),
        ],
        "node k: .*beyond any size",
    ),
    "shift": ([*BEHIND, call("bomb", "operator.lshift", 1, node("d"))], "bomb.*sizes are added"),
    "many elements": (
        [
            *BEHIND,
            call("k", "operator.mul", node("d"), 4 * 10**11),
            call("z", "torch.zeros", node("k")),
        ],
        "node k: .*beyond any size",
    ),
    "cubes": (
        [
            LENGTH,
            call("two", "operator.mul", node("s"), node("s")),
            call("k", "operator.mul", node("two"), node("s")),
        ],
        "node k: .*beyond any size",
    ),
    "sums": (
        [
            LENGTH,
            call("one", "operator.mul", node("s"), 10**5),
            call("k", "operator.add", node("one"), node("one")),
        ],
        "node k: .*beyond any size",
    ),
    "strides": (
        [
            [METHOD, "s", "stride", [IDS]],
            call("one", "operator.getitem", node("s"), 0),
            call("k", "operator.mul", node("one"), 2),
        ],
        "node k: .*beyond any size",
    ),
    "division by a size": (
        [*BEHIND, call("k", "operator.floordiv", 1, node("d"))],
        "node k: .*divided by constants",
    ),
    "comparison": ([LENGTH, call("g", "operator.gt", node("s"), 5)], "node g: "),
    "equality": ([LENGTH, call("g", "operator.eq", node("s"), 5)], "node g: "),
    "computed index": (
        [*BEHIND, call("k", "operator.getitem", written(1, 10**8), node("d"))],
        "node k: .*getitem of tuple, int",
    ),
    "computed slice": (
        [*BEHIND, call("k", "operator.getitem", written(1, 2), {"slice": [0, node("d"), None]})],
        "node k: .*getitem of tuple, slice",
    ),
    "outer products": (
        [
            call("o0", "torch.outer", node("row"), node("row")),
            [METHOD, "f0", "flatten", [node("o0")]],
            call("o1", "torch.outer", node("f0"), node("f0")),
        ],
        "node o1: .*elements for .* tokens",
    ),
    "write behind a view": (
        [
            ["get_attr", "w", "model.norm.weight", []],
            [METHOD, "c", "contiguous", [node("w")]],
            call("put", "operator.iadd", node("c"), 1.0),
        ],
        "node put: .*clone it before",
    ),
    **{
        f"{kind} pieces": (
            [call("z", "torch.zeros", 10**6), call("u", f"torch.{kind}", node("z"), *rest)],
            f"node u: .*pieces|node u: .*{10**6}",
        )
        for kind, rest in {"unbind": [], "split": [1], "chunk": [10**6]}.items()
    },
    "method pieces": (
        [call("z", "torch.zeros", 3, 10**6), [METHOD, "u", "unbind", [node("z"), -1]]],
        "node u: .*pieces",
    ),
    "nested tuples": (
        [
            call("p", "operator.getitem", written(written(1)), 0),
            *doubled("p", "q", 13),
            call("r", "operator.getitem", written(written(node("q"))), 0),
            *doubled("r", "t", 13),
        ],
        "items",
    ),
    "together": (
        [
            *(call(f"z{i}", "torch.zeros", 2**25 - 1) for i in range(30)),
            call(
                "st", "operator.getitem", written(written(*(node(f"z{i}") for i in range(30)))), 0
            ),
        ],
        "at a time",
    ),
    "subtracted": (
        # 0 at 1, 5 and 7 tokens, and at the longest row: what is left of a cut is less than it.
        [
            *ZEROS,
            call("cut", "operator.getitem", node("z"), {"slice": [None, 40, None]}),
            [METHOD, "c", "size", [node("cut"), 0]],
            call("d", "operator.sub", node("s"), node("c")),
            call("k", "operator.mul", node("d"), 2**16),
        ],
        UNEVEN,
    ),
    "cut at the front": (
        [
            *ZEROS,
            call("p", "operator.mul", node("s"), 15),
            call("cut", "operator.getitem", node("w"), {"slice": [node("p"), None, None]}),
        ],
        f"{UNEVEN}|node cut: .*585 elements",
    ),
    "squares": ([LENGTH, call("k", "operator.mul", node("s"), node("s"))], UNEVEN),
    "rounded": ([LENGTH, call("k", "operator.floordiv", node("s"), 30)], UNEVEN),
    "divided": (
        [*ZEROS, [METHOD, "v", "view", [node("even"), node("s"), -1]]],
        f"{UNEVEN}|cannot be computed",
    ),
    "pieces of a row": (
        [*ZEROS, call("c", "torch.chunk", node("z"), 4)],
        UNEVEN,
    ),
    "of a batch": (
        [
            [METHOD, "b", "size", [IDS, 0]],
            call("zb", "torch.zeros", node("b")),
            call("cut", "operator.getitem", node("zb"), {"slice": [100, None, None]}),
        ],
        UNEVEN,
    ),
    "a number's data": (
        [
            LENGTH,
            call("t", "torch.tensor", node("s")),
            call("hit", "operator.eq", node("t"), 33),
            call("far", "operator.mul", node("hit"), 10**9),
            call("z", "torch.arange", node("far")),
        ],
        "node z: .*cannot be computed",
    ),
    "nodes": ([call(f"x{i}", "operator.mul", 2, 3) for i in range(100_001)], "no model has more"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sizes") / "saved"
    fxquant.save(fxquant.convert(llama(num_hidden_layers=1), "w4-g16"), directory)
    return directory


@pytest.mark.parametrize("name", CRAFTED)
def test_sizes_are_bounded_whatever_the_length(name: str, saved: Path, tmp_path: Path) -> None:
    nodes, message = CRAFTED[name]
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    data = json.loads((copy / "graph.json").read_text())
    row = [FUNCTION, "row", "operator.getitem", [IDS, 0]]
    data["nodes"][2:2] = [[*each, {}, {}] for each in (row, *nodes)]
    write(copy, data)
    with watched(copy, seconds=20) as seen, pytest.raises(CheckpointError, match=message):
        fxquant.load(copy)
    assert not seen
