"""No module that a model's folder holds is imported, whatever stands on stdin."""

from __future__ import annotations

import ast
import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import pytest

import fxquant
from fxquant.errors import ModelError
from fxquant.exports import gguf
from fxquant.exports.gguf_file import MODEL
from fxquant.frontends.pretrained import (
    read_gguf_model,
    read_model,
    read_tokenizer,
    read_written,
)
from fxquant.frontends.streaming import stream
from tests.architectures import opt
from tests.attack.bad import SHORT, edit_json, exit_code, refused, write_model
from tests.hub_format import character_tokenizer
from tests.processes import FXQUANT, finished
from tests.test_export_compressed import tiny_llama

ROOT = Path(__file__).parents[2]
PLANTED = """
from pathlib import Path
Path({canary!r}).write_text("ran")
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast
class C(OPTConfig):
    model_type = "planted"
class M(OPTForCausalLM):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(autouse=True)
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question is answered with yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 1000))
    monkeypatch.setattr("builtins.input", lambda *_: "yes")


def plant(folder: Path, canary: Path) -> Path:
    (folder / "planted.py").write_text(PLANTED.format(canary=str(canary)))
    return folder


def of_config(data: dict[str, Any]) -> None:
    data["model_type"] = "planted"
    data["auto_map"] = {"AutoConfig": "planted.C", "AutoModelForCausalLM": "planted.M"}


def of_nameless_config(data: dict[str, Any]) -> None:
    of_config(data)
    del data["model_type"]


def of_model(data: dict[str, Any]) -> None:
    data["model_type"] = "vit"  # known, but no causal LM
    data["auto_map"] = {"AutoModelForCausalLM": "planted.M"}


def of_elsewhere(data: dict[str, Any]) -> None:
    of_config(data)
    data["auto_map"] = {"AutoConfig": "owner/name--planted.C"}


def of_tokenizer(data: dict[str, Any]) -> None:
    data["tokenizer_class"] = "T"
    data["auto_map"] = {"AutoTokenizer": ["planted.T", "planted.T"]}


PLACES = [
    ("config.json", of_config),
    ("config.json", of_nameless_config),
    ("config.json", of_model),
    ("config.json", of_elsewhere),
    ("tokenizer_config.json", of_tokenizer),
]
READ_NO_TEXT = [("convert", "--scheme", "w8"), ("inspect", "--scheme", "w8")]
COMMANDS = [
    ("evaluate", "--schemes", "w8", *SHORT),
    ("evaluate", "--schemes", "w8", "--stream", *SHORT),
    *READ_NO_TEXT,
    ("explain", "--scheme", "w8a8-dynamic", *SHORT),
    ("plan", "--budget", "1", *SHORT),
]


@pytest.mark.parametrize(("file", "change"), PLACES, ids=lambda v: getattr(v, "__name__", v))
def test_a_planted_module_never_runs(
    file: str, change: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = tmp_path / "canary"
    folder = plant(write_model(tmp_path / "model"), canary)
    edit_json(folder / file, change)
    for command in COMMANDS:
        asked = (command[0], "--model", folder, *command[1:])
        if change is of_tokenizer and command in READ_NO_TEXT:
            assert exit_code(*asked) == 0, capsys.readouterr().err
        else:
            refused(capsys, asked, str(folder), "custom code")
        assert not canary.exists()
    with pytest.raises(ModelError, match="custom code"):
        read_tokenizer(folder) if change is of_tokenizer else read_model(folder, dtype="auto")
    if change is not of_tokenizer:
        with pytest.raises(ModelError, match="custom code"):
            stream(folder)
    assert not canary.exists()


def test_a_sweep_records_that_code_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = tmp_path / "canary"
    folder = plant(write_model(tmp_path / "model"), canary)
    edit_json(folder / "config.json", of_config)
    file = tmp_path / "mine.toml"
    file.write_text(f'models = ["{folder}"]\nschemes = ["w8"]\nlength = 16\nwindows = 1\n')
    assert exit_code("sweep", file, "--output", tmp_path / "out") == 1
    results = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert all("custom code" in json.loads(line)["error"] for line in results)
    assert not canary.exists()


def test_beside_a_saved_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canary, saved = tmp_path / "canary", tmp_path / "saved"
    graph = fxquant.convert(opt(), "w8")
    fxquant.save(graph, saved, character_tokenizer())
    plain = exit_code("evaluate", "--model", saved, *SHORT)
    assert plain == 0
    plant(saved, canary)
    edit_json(saved / "tokenizer_config.json", of_tokenizer)
    capsys.readouterr()
    assert exit_code("evaluate", "--model", saved, *SHORT) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert not canary.exists()


def test_an_architecture_that_transformers_has_is_read_by_transformers(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = plant(write_model(tmp_path / "model"), canary)
    edit_json(
        folder / "config.json",
        lambda data: data.update(auto_map={"AutoModelForCausalLM": "planted.M"}),
    )
    assert exit_code("evaluate", "--model", folder, "--schemes", "w8", *SHORT) == 0
    assert not canary.exists()


def plant_generate(folder: Path, canary: Path) -> None:
    """transformers 4.57 would import it from any folder, and refuse one that is planted wrong."""
    (folder / "custom_generate").mkdir()
    planted = f"from pathlib import Path\nPath({str(canary)!r}).write_text('ran')\n"
    (folder / "custom_generate" / "generate.py").write_text(planted)
    (folder / "custom_generate" / "requirements.txt").write_text("no-such-package\n")


def test_a_generate_of_its_own_is_left_alone(tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", write_model(tmp_path / "model")
    plant_generate(folder, canary)
    for command in COMMANDS[:4]:
        assert exit_code(command[0], "--model", folder, *command[1:]) == 0
    model = read_model(folder, dtype="auto")
    assert isinstance(model.generate, MethodType)  # transformers' own
    read_written(folder)
    assert not canary.exists()


@pytest.mark.needs_program(find_spec("gguf"), "gguf, of the exports extra")
def test_nor_is_one_beside_a_gguf_file_run(tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "out"
    gguf(tiny_llama(), folder, scheme="w8-g32-fp16", check=False)
    plant_generate(folder, canary)
    read_gguf_model(folder / MODEL)
    assert not canary.exists()


def test_a_kernel_of_the_hub_is_not_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "model")
    for value in ("owner/kernel", "owner/kernel:main", {"": "owner/kernel"}):
        edit_json(
            folder / "config.json",
            lambda data, value=value: data.update(_attn_implementation=value),  # type: ignore[misc]
        )
        for more in ((), ("--stream",)):
            command = ("evaluate", "--model", folder, "--schemes", "w8", *SHORT, *more)
            refused(capsys, command, str(folder), "owner/kernel")


def test_yes_on_a_pipe(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = plant(write_model(tmp_path / "model"), canary)
    edit_json(folder / "config.json", of_config)
    command = [*FXQUANT, "evaluate", "--model", str(folder), "--schemes", "w8"]
    done = finished(command, "yes\n" * 1000)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "custom code" in done.stderr
    assert not canary.exists()


def calls(path: Path) -> list[ast.Call]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]


def test_models_are_loaded_in_one_place_and_without_their_code() -> None:
    files = [p for d in ("fxquant", "passes", "evaluation", "benchmarks") for p in
             (ROOT / d).rglob("*.py")]  # fmt: skip
    assert len(files) > 100
    door = ROOT / "fxquant" / "frontends" / "pretrained.py"
    loads = {"from_pretrained", "from_config", "_from_config", "register_for_auto_class"}
    for path in files:
        found = [call for call in calls(path) if call.func.attr in loads]  # type: ignore[attr-defined]
        if path != door:
            assert not found, f"{path} loads by itself: call fxquant.frontends.pretrained"
            assert "transformers.pipeline" not in path.read_text()
    found = [call for call in calls(door) if call.func.attr in loads]  # type: ignore[attr-defined]
    assert len(found) == 7
    for call in found:
        flags = [k.value for k in call.keywords if k.arg == "trust_remote_code"]
        assert len(flags) == 1, f"line {call.lineno}"
        assert isinstance(flags[0], ast.Constant)
        assert flags[0].value is False
