"""What a command is told that starts from an export, or from a folder that is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import fxquant
from fxquant.cli.main import main
from fxquant.errors import ExportError, ModelError
from fxquant.exports.folder import RECORD
from fxquant.exports.table import FORMATS
from tests.models import SMALL_OPT, small_opt

FROM_A_MODEL = (
    "convert --scheme w8",
    "inspect",
    "inspect --scheme w8",
    "export --to gptq --output {out}",
    "export --to compressed-tensors --scheme w8 --output {out}",
    "explain --scheme w8a8-static",
    "plan --budget 0.1",
)


def export(folder: Path, target: str) -> Path:
    """A model's folder with the record of an export, which is all that is looked at."""
    shutil.copytree(SMALL_OPT, folder)
    (folder / RECORD).write_text(json.dumps({"format": "fxquant export", "target": target}))
    return folder


@pytest.mark.parametrize("target", FORMATS)
def test_an_export_is_named_and_what_runs_it(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(tmp_path / "out", target)
    engines = {"onnx": "onnxruntime", "compressed-tensors": "transformers or vllm"}.get(target)
    for command in FROM_A_MODEL:
        asked = command.format(out=tmp_path / "other").split()
        name, *rest = asked
        assert main([name, "--model", str(folder), *rest]) == 2
        error = capsys.readouterr().err
        assert f"{folder} is an export to {target}, which no scheme starts from" in error
        assert ("fxquant evaluate --runtime" in error) == (engines is not None)
    assert main(["evaluate", "--model", str(folder)]) == 2
    error = capsys.readouterr().err
    said = f"give --runtime {engines}, the engine" if engines else "no --runtime runs it"
    assert f"is an export to {target}: {said}" in error
    sweep = tmp_path / "s.toml"
    sweep.write_text(f'models = ["{folder}"]\nschemes = ["w8"]\nruntime = "transformers"\n')
    assert main(["sweep", str(sweep), "--output", str(tmp_path / "swept")]) == 2
    assert f"{folder} is an export to {target}, which no scheme" in capsys.readouterr().err
    with pytest.raises(ModelError, match="which no scheme starts from"):
        fxquant.load_model(folder)
    runs = rf"as runtime= \({engines}\)" if engines else "no runtime runs it"
    with pytest.raises(ExportError, match=runs):
        fxquant.evaluate(folder, fxquant.windows("builtin", small_opt()[1], count=1, length=8))


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("evaluate", "--schemes"),
        ("inspect", "--scheme"),
        ("export --to pt2 --output x", "--scheme"),
    ],
)
def test_a_misspelt_folder_of_a_saved_graph_is_said(
    command: str, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w8a8").mkdir()
    name, *rest = command.split()
    assert main([name, "--model", str(tmp_path / "w8a9"), *rest]) == 2
    error = capsys.readouterr().err
    assert f"give {flag}, such as" in error
    assert f"{tmp_path / 'w8a9'} is no folder in" in error
    assert f"did you mean '{tmp_path / 'w8a8'}'?" in error
    assert main([name, "--model", "package:no-such-model", *rest]) == 2
    assert "is no folder" not in capsys.readouterr().err


def test_an_unknown_option_is_said_by_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    for asked in ("convert --scheme w8 --runtime onnxruntime", "convert --scheme w8 w4"):
        with pytest.raises(SystemExit) as stop:
            main([*asked.split(), "--model", str(SMALL_OPT)])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("fxquant convert: error: unrecognized arguments: ")
        assert error.endswith("(options: fxquant convert -h)\n")
