"""Checkpoints whose nodes write into what is stored, or cannot take the values they are given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import fxquant
from fxquant.errors import CheckpointError, GraphCallError
from fxquant.run.execution import Executor
from tests.architectures import llama, token_ids
from tests.attack.mutations import write
from tests.attack.watch import watched

FUNCTION, METHOD = "call_function", "call_method"
IDS = {"node": "input_ids"}
GAIN = ["get_attr", "w", "model.norm.weight", [], {}]
TABLE = ["get_attr", "w", "model.embed_tokens.weight", [], {}]
OWN = [METHOD, "c", "clone", [{"node": "w"}], {}]


def call(name: str, target: str, *args: Any, **kwargs: Any) -> list[Any]:
    return [FUNCTION, name, target, list(args), kwargs]


def node(name: str) -> dict[str, str]:
    return {"node": name}


def twice(first: list[Any], target: str, *rest: Any, **kwargs: Any) -> list[list[Any]]:
    """The same call of a tensor of the graph's own, and of the stored one."""
    calls = [call(f"r{x}", target, node(x), *rest, **kwargs) for x in ("c", "w")]
    return [first, OWN, *calls]


WRITING: dict[str, list[list[Any]]] = {
    "by keyword": twice(GAIN, "functional.leaky_relu", 0.5, inplace=True),
    "by position": twice(GAIN, "functional.silu", True),
    "an input": [
        [METHOD, "c", "clone", [IDS], {}],
        *(call(f"r{i}", "functional.relu", x, True) for i, x in enumerate([node("c"), IDS])),
    ],
    "behind a view": [
        GAIN,
        OWN,
        *([METHOD, f"v{x}", "view", [node(x), -1], {}] for x in ("c", "w")),
        call("r", "functional.mish", node("vw"), inplace=True),
    ],
    "behind a piece": [
        GAIN,
        OWN,
        *(call(f"p{x}", "torch.chunk", node(x), 2) for x in ("c", "w")),
        *(call(f"g{x}", "operator.getitem", node(f"p{x}"), 0) for x in ("c", "w")),
        call("r", "functional.hardswish", node("gw"), inplace=True),
    ],
    "behind a cast to its own dtype": [
        GAIN,
        OWN,
        *([METHOD, f"f{x}", "float", [node(x)], {}] for x in ("c", "w")),
        call("r", "functional.silu", node("fw"), inplace=True),
    ],
    "rows that are rescaled": [
        TABLE,
        OWN,
        *(call(f"e{x}", "functional.embedding", IDS, node(x), max_norm=0.1) for x in ("c", "w")),
    ],
}
VALUES: dict[str, tuple[list[list[Any]], str]] = {
    "full_like": ([call("a", "torch.full_like", IDS, 1e308)], "without overflow"),
    "full": (
        [call("a", "torch.full", [2, 2], 300, dtype={"dtype": "int8"})],
        "without overflow",
    ),
    "gather": ([call("a", "torch.gather", IDS, 1, IDS)], "out of bounds"),
    "scatter": ([[METHOD, "a", "scatter", [IDS, 1, IDS, 5], {}]], "out of bounds"),
    "index_select": (
        [
            call("t", "torch.tensor", [99]),
            call("a", "torch.index_select", IDS, 1, node("t")),
        ],
        "out of|index",
    ),
    "index": ([call("a", "operator.getitem", IDS, IDS)], "out of bounds"),
    "floordiv": ([call("a", "operator.floordiv", IDS, 0)], "ZeroDivisionError"),
    "mod": ([call("a", "operator.mod", IDS, 0)], "ZeroDivisionError"),
    "pow": ([call("a", "operator.pow", IDS, -1)], "negative integer powers"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("effects") / "saved"
    fxquant.save(fxquant.convert(llama(num_hidden_layers=1), "w4-g16"), directory)
    return directory


def crafted(saved: Path, tmp_path: Path, nodes: list[list[Any]]) -> Path:
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    data = json.loads((copy / "graph.json").read_text())
    data["nodes"][2:2] = [[*each, {}] for each in nodes]
    write(copy, data)
    return copy


@pytest.mark.parametrize("name", WRITING)
def test_no_node_writes_into_what_is_stored(name: str, saved: Path, tmp_path: Path) -> None:
    copy = crafted(saved, tmp_path, WRITING[name])
    with pytest.raises(CheckpointError, match=r"node [erw]\w*: .*clone it before"):
        fxquant.load(copy)


def test_a_tensor_of_the_graph_s_own_may_be_written_into(saved: Path, tmp_path: Path) -> None:
    nodes: list[list[Any]] = [
        GAIN,
        OWN,
        call("r", "functional.leaky_relu", node("c"), 0.5, inplace=True),
    ]
    graph, ids = fxquant.load(crafted(saved, tmp_path, nodes)), token_ids(2, 9)
    assert torch.equal(graph(ids), fxquant.load(saved)(ids))
    assert torch.equal(graph(ids), graph(ids))


@pytest.mark.parametrize("text", ["a" * 10**6, " " * 10**6 + "->!", "a," * 10**5])
def test_a_long_equation_is_refused_at_once(text: str, saved: Path, tmp_path: Path) -> None:
    copy = crafted(saved, tmp_path, [call("a", "torch.einsum", text, IDS)])
    with watched(copy, seconds=20), pytest.raises(CheckpointError, match="does not take the text"):
        fxquant.load(copy)


@pytest.mark.parametrize("name", VALUES)
def test_values_that_torch_does_not_take_are_one_error_of_a_call(
    name: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes, message = VALUES[name]
    graph: GraphModule = fxquant.load(crafted(saved, tmp_path, nodes))
    ids = token_ids(2, 9)
    with pytest.raises(GraphCallError, match=message):
        graph(ids)
    with torch.no_grad(), pytest.raises(GraphCallError, match=f"node a: .*({message})"):
        Executor(graph).run(input_ids=ids)
    assert not capsys.readouterr().err


UNSET: dict[str, list[Any]] = {
    "empty": call("a", "torch.empty", [3]),
    "empty_like": call("a", "torch.empty_like", IDS),
    "new_empty": [METHOD, "a", "new_empty", [IDS, 3], {}],
}


@pytest.mark.parametrize("name", UNSET)
def test_memory_of_the_process_is_not_shown(name: str, saved: Path, tmp_path: Path) -> None:
    graph = fxquant.load(crafted(saved, tmp_path, [UNSET[name]]))
    seen: dict[str, Any] = {}
    Executor(graph).run(lambda n, v: seen.setdefault(n.name, v), input_ids=token_ids(2, 9))
    assert not torch.count_nonzero(seen["a"])
    assert not any("empty" in str(n.target) for n in graph.graph.nodes)
    fxquant.save(graph, tmp_path / "again")
    fxquant.load(tmp_path / "again")


@pytest.mark.parametrize("given", [([None, 0.5], {}), ([], {"dropout_p": 0.5})])
def test_a_graph_computes_the_same_each_time(given: Any, saved: Path, tmp_path: Path) -> None:
    rest, options = given
    nodes: list[list[Any]] = [
        [METHOD, "f", "float", [IDS], {}],
        [METHOD, "u", "unsqueeze", [node("f"), -1], {}],
        call("a", "functional.scaled_dot_product_attention", *[node("u")] * 3, *rest, **options),
    ]
    with pytest.raises(CheckpointError, match="node 'a': attention that drops scores at random"):
        fxquant.load(crafted(saved, tmp_path, nodes))
