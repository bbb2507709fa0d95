"""Devices and dtypes that are none or not there, and graphs without values: one error each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import fxquant
from fxquant.errors import FxquantError, GraphCallError, GraphError, ModelError
from tests.architectures import opt, token_ids
from tests.attack.bad import write_model
from tests.hub_format import character_tokenizer

IDS = token_ids(2, 8)
DEVICES: tuple[Any, ...] = (
    "abacus", "", "cuda:99", "cuda:-1", "cpu:x", "cpu\0", "\ud800", "xla", "mps", "vulkan", "hpu",
    "privateuseone", None, 3, -1, 3.5, True, b"cpu", ["cpu"], torch.float32, torch.device("xla"),
)  # fmt: skip
DOORS: dict[str, Callable[[Path, Any], object]] = {
    "load": lambda at, device: fxquant.load(at / "graph", device),
    "load streamed": lambda at, device: fxquant.load(at / "graph", device, stream=True),
    "load_model": lambda at, device: fxquant.load_model(at / "model", device=device),
    "load_model streamed": lambda at, device: fxquant.load_model(
        at / "model", device=device, streamed=True
    ),
    "load_model of a graph": lambda at, device: fxquant.load_model(at / "graph", device=device),
    "stream": lambda at, device: fxquant.stream(at / "model", device=device),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    write_model(folder / "model")
    fxquant.save(fxquant.trace(opt()), folder / "graph", character_tokenizer())
    return folder


@pytest.mark.parametrize("door", DOORS)
def test_devices_that_are_not_there(door: str, places: Path) -> None:
    for device in DEVICES:
        with pytest.raises(FxquantError, match=r"^device .*give device='cpu'") as caught:
            DOORS[door](places, device)
        assert str(caught.value).isprintable()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("door", DOORS)
def test_cuda_where_there_is_none(door: str, places: Path) -> None:
    for device in ("cuda", torch.device("cuda:0")):
        with pytest.raises(FxquantError, match=r"^device 'cuda(:0)?' cannot be used here"):
            DOORS[door](places, device)


@pytest.mark.parametrize("door", DOORS)
def test_a_torch_device_is_taken_and_meta_computes_nothing(door: str, places: Path) -> None:
    DOORS[door](places, torch.device("cpu"))
    if door != "load":
        for device in ("meta", torch.device("meta")):
            with pytest.raises(FxquantError, match="meta"):
                DOORS[door](places, device)


@pytest.mark.parametrize(
    "options",
    [
        *({"dtype": dtype} for dtype in ("float64", 3, b"x", ["a"], "", torch.int8, torch.cfloat)),
        *({"attention": each} for each in ("abacus", "owner/kernel", 3, ["eager"], True)),
    ],
    ids=str,
)
def test_options_of_streaming(options: dict[str, Any], places: Path) -> None:
    with pytest.raises(ModelError, match=rf"^{next(iter(options))} "):
        fxquant.stream(places / "model", **options)


@pytest.mark.parametrize("dtype", ["int8", "float64", torch.int8, 3, None, b"x", ["a"], ""])
def test_dtypes_of_models(dtype: Any, places: Path) -> None:
    with pytest.raises(ModelError, match="unknown dtype"):
        fxquant.load_model(places / "model", dtype=dtype)


USES: dict[str, Callable[[GraphModule, Path], object]] = {
    "convert": lambda graph, _: fxquant.convert(graph, "w8"),
    "calibrate": lambda graph, _: fxquant.convert(graph, "w8a8-static", calibration=[IDS]),
    "evaluate": lambda graph, _: fxquant.evaluate(graph, IDS),
    "explain": lambda graph, _: fxquant.explain(graph, "w8", data=IDS),
    "plan": lambda graph, _: fxquant.plan(graph, data=IDS, budget=1.0),
    "save": lambda graph, at: fxquant.save(graph, at / "saved"),
}


@pytest.mark.parametrize("use", USES)
def test_a_graph_without_values(use: str, tmp_path: Path) -> None:
    whole, part = (copy.deepcopy(fxquant.trace(opt())) for _ in range(2))
    whole.to("meta")
    part.get_submodule("model.decoder.layers.0.fc1").to("meta")
    for graph in (whole, part):
        with pytest.raises(FxquantError, match=r"\.weight of the graph is on device meta"):
            USES[use](graph, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_reads_rows_that_are_not_there_says_which_node() -> None:
    """As one from a file may, whose ids fit its vocabulary but not a table behind it."""
    graph = fxquant.trace(opt())
    table = graph.get_submodule("model.decoder.embed_positions")
    table.weight = torch.nn.Parameter(table.get_parameter("weight")[:4])
    windows = token_ids(2, 16)
    for use in (
        lambda: fxquant.evaluate(graph, windows),
        lambda: fxquant.explain(graph, "w8", data=windows),
        lambda: fxquant.convert(graph, "w8a8-static", calibration=[windows]),
    ):
        with pytest.raises(FxquantError, match="node embedding: embedding cannot be computed"):
            use()
    with pytest.raises(GraphCallError, match="a row is read that its table does not have"):
        graph(windows)


def test_a_graph_in_a_dtype_without_kernels_says_which_node() -> None:
    graph = fxquant.trace(opt()).to(torch.float8_e4m3fn)
    with pytest.raises(FxquantError, match=r"node .* cannot be computed here"):
        fxquant.evaluate(graph, IDS)
    with pytest.raises(GraphCallError):
        graph(IDS)


def test_what_is_no_graph_of_ours_stays_named() -> None:
    with pytest.raises(GraphError):
        fxquant.evaluate(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)), IDS)
