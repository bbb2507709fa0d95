"""A saved graph goes wherever ``--model`` goes, or it is said at once why it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule
from transformers import PreTrainedModel

import fxquant
from fxquant.cli.main import main
from fxquant.evaluation import models
from fxquant.ir.graph import info
from tests.architectures import token_ids
from tests.models import SMALL_OPT

TEXT = ("--text", "LICENSE", "--length", "48", "--calibration-windows", "2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small OPT, as it is traced and quantized."""
    folder = tmp_path_factory.mktemp("saved")
    loaded = fxquant.load_model(SMALL_OPT)
    ids = fxquant.windows("LICENSE", loaded.tokenizer, count=1, length=32, calibration=1)
    graphs = {
        "float": fxquant.convert(loaded.model, "fp", level="float"),
        "quantized": fxquant.convert(loaded.model, "w8a8-dynamic"),
        "fp32": fxquant.convert(loaded.model, "fp32-gemm"),
        "products": fxquant.convert(loaded.model, "w8a8-dynamic+attn8", level="float"),
        "chosen": fxquant.convert(loaded.model, "w8+gptq", calibration=ids.batches, level="float"),
    }
    for name, graph in graphs.items():
        fxquant.save(graph, folder / name, loaded.tokenizer)
    return {name: folder / name for name in graphs}


COMMANDS = {
    "inspect": ("inspect", "--scheme", "w4"),
    "explain": ("explain", "--scheme", "w4", "--windows", "1", "--worst", "0", *TEXT),
    "plan": ("plan", "--budget", "9", "--windows", "1", *TEXT),
    "convert": ("convert", "--scheme", "w4", *TEXT),
    "evaluate": ("evaluate", "--schemes", "w4", "--windows", "1", *TEXT),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_saved_float_graph_is_a_model(
    name: str, saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed of it is what is printed of the model, but for its name."""
    printed = []
    for model in (saved["float"], SMALL_OPT):
        assert main([*COMMANDS[name], "--model", str(model)]) == 0
        said = capsys.readouterr().out
        assert "w4" in said
        printed.append(said)
    if name == "evaluate":
        of_graph, of_model = (text.split("|")[1:16] for text in printed)
        assert of_graph[:14] == of_model[:14]


REFUSED = {
    "quantized": "the graph is quantized already (scheme w8a8-dynamic",
    "fp32": "the graph's linears compute in fp32 already",
    "products": "attention's products are sites of this graph already",
}


@pytest.mark.parametrize("graph", REFUSED)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_graph_that_no_scheme_can_start_from_is_refused_by_name(
    name: str, graph: str, saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMANDS[name], "--model", str(saved[graph])]) == 2
    said = capsys.readouterr().err
    assert f"{saved[graph]}: {REFUSED[graph]}" in said
    assert "start from the model" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_codes_that_a_repair_chose_are_not_chosen_again(
    name: str, saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMANDS[name], "--model", str(saved["chosen"])]) == 2
    said = capsys.readouterr().err
    assert "a repair of this graph has chosen its codes as w8, the scheme asks for w4" in said
    assert "start from the model" in said


def test_codes_that_a_repair_chose_are_taken_by_their_scheme(saved: dict[str, Path]) -> None:
    graph = fxquant.load(saved["chosen"])
    ids = token_ids(2, 9)
    whole = fxquant.convert(graph, "w8")(ids)
    assert torch.equal(whole, fxquant.convert(graph, "w8", level="qdq")(ids))
    assert not torch.equal(whole, fxquant.convert(fxquant.load_model(SMALL_OPT).model, "w8")(ids))


def test_a_saved_graph_is_inspected_as_it_is(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("float", "quantized"):
        path = saved[name]
        assert main(["inspect", "--model", str(path), "--format", "json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["level"] == {"float": "float", "quantized": "integer"}[name]
    assert main(["inspect", "--model", str(saved["quantized"]), "--diff", "integerize"]) == 0
    assert "int_gemm" in capsys.readouterr().out
    assert main(["inspect", "--model", str(SMALL_OPT)]) == 2
    assert "no saved graph: give --scheme" in capsys.readouterr().err


def test_a_model_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = fxquant.load_model(SMALL_OPT)
    calls: list[object] = []

    def counted(model: PreTrainedModel) -> GraphModule:
        calls.append(model)
        return fxquant.trace(model)

    monkeypatch.setattr(models, "trace", counted)
    assert loaded.graph is loaded.graph
    assert calls == [loaded.model]
    assert info(loaded.graph).model == loaded.name
