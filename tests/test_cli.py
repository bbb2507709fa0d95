"""The command line, as a user calls it."""

from __future__ import annotations

import errno
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import datasets
import pytest

from fxquant.cli.main import main
from tests.hub_format import write_wikitext
from tests.models import SMALL_OPT, small_opt
from tests.processes import finished

SHORT = ["--windows", "2", "--length", "48", "--calibration-windows", "2"]


def test_evaluate_prints_table_provenance_and_sentences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(SMALL_OPT), "--schemes", "w8", "w8a8-static", *SHORT]
    assert main(["evaluate", *options, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in printed.splitlines()[2:5]] == [
        "fp",
        "w8",
        "w8a8-static",
    ]
    assert "2 windows of 48 tokens" in printed
    assert "Weights alone: w8" in printed
    data = json.loads((tmp_path / "results.json").read_text())
    assert len(data["rows"]) == 3
    expected = shlex.join(["fxquant", "evaluate", *options, "--output", str(tmp_path)])
    assert data["provenance"]["command"] == expected


def test_errors_are_one_message_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", "x", "--schemes", "w8x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fxquant: error: scheme not understood")
    assert "\n  w8x\n    ^\n" in error


def test_module_form_is_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fxquant.evaluation", "--model", str(SMALL_OPT)]
    command += ["--schemes", "fp", *SHORT, "--output", str(tmp_path)]
    done = finished(command)
    assert "| fp" in done.stdout, done.stderr
    # No terminal: progress bars stay quiet.
    assert "%|" not in done.stderr
    recorded = json.loads((tmp_path / "results.json").read_text())["provenance"]["command"]
    assert recorded.startswith("fxquant evaluate --model")
    assert "--schemes fp" in recorded


def test_a_text_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "some.txt"
    text.write_text(" ".join(f"The {n}th sentence is about the number {n}." for n in range(400)))
    options = ["--model", str(SMALL_OPT), "--schemes", "fp", "--text", str(text), *SHORT]
    assert main(["evaluate", *options]) == 0
    assert "some.txt" in capsys.readouterr().out


STATIC = ["--model", str(SMALL_OPT), "--scheme", "w8a8-static", "--length", "48"]
STATIC += ["--calibration-windows", "2"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, *STATIC]) == 0
    return capsys.readouterr().out


def test_inspect_prints_what_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = tmp_path / "block.dot"
    listing = printed(capsys, "inspect", "--layer", "1", "--dot", str(block))
    assert listing.startswith("model.decoder.layers.1, level integer, scheme w8a8-static")
    assert block.read_text().startswith('digraph "model.decoder.layers.1"')
    diff = printed(capsys, "inspect", "--diff", "integerize", "--format", "markdown")
    assert diff.startswith("```diff\n--- before integerize")
    data = json.loads(printed(capsys, "inspect", "--format", "json"))
    assert data["scheme"] == "w8a8-static"
    assert len(data["sites"]) == 26


def test_convert_prints_after_passes_as_they_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "convert", "--print-after", "observe,integerize")
    heads = [line for line in text.splitlines() if line.startswith("===")]
    assert heads == ["=== after pass 2, observe", "=== after pass 5, integerize"]
    assert "HistogramObserver" in text
    assert text.index("=== after pass 5") < text.index("\nHistory")


@pytest.mark.parametrize("command", ["convert --scheme", "evaluate --windows 1 --schemes"])
def test_finished_blocks_are_kept_in_the_named_folder(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["w4+gptq", "--model", str(SMALL_OPT), "--length", "64", "--calibration-windows", "1"]
    asked = [*command.split(), *options, "--cache", str(tmp_path)]
    assert main(asked) == 0
    files = list(tmp_path.rglob("*.safetensors"))
    assert files
    files[0].write_bytes(b"broken")
    assert main(asked) == 0
    assert f"fxquant: note: {files[0]} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "--diff", "integrize"], "no pass 'integrize' in this graph; did you mean"),
        (["inspect", "--length", "1"], "2 tokens"),
        (["inspect", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["convert", "--print-after", "observe,fold"], "no pass 'fold' in this graph; known: name"),
        (["convert", "--calibration-windows", "0"], "needs calibration data"),
        (["convert", "--cache", "blocks"], "no scheme here has a repair that keeps"),
    ],
)
def test_bad_requests_are_refused_before_a_model_is_loaded(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = arguments
    assert main([command, "--model", "no/such", "--scheme", "w8a8-static", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["evaluate --schemes w8 --text", "evaluate --schemes", "sweep", "table", "convert --scheme"],
)
def test_a_missing_file_is_said_once_with_one_of_a_like_name(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix = {"sweep": ".toml", "table": ".jsonl"}.get(command, ".json")
    there, asked = tmp_path / f"some{suffix}", tmp_path / f"sme{suffix}"
    there.write_text("text")
    name, *options = command.split()
    model = [] if name in ("sweep", "table") else ["--model", str(SMALL_OPT)]
    assert main([name, *model, *options, str(asked)]) == 2
    error = capsys.readouterr().err
    assert re.match(
        rf"fxquant: error: (scheme: )?cannot read {asked}: there is no such file", error
    )
    assert error.count(str(asked)) == 1
    assert "Errno" not in error
    if command != "table":
        assert f"did you mean {str(there)!r}?" in error


def test_a_sweeps_table_is_not_an_evaluations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", str(tmp_path)]) == 2
    assert f"cannot read {tmp_path / 'results.jsonl'}: there is no" in capsys.readouterr().err
    options = ["--model", str(SMALL_OPT), "--schemes", "fp", *SHORT, "--output", str(tmp_path)]
    assert main(["evaluate", *options]) == 0
    capsys.readouterr()
    for meant in (tmp_path, tmp_path / "results.json", tmp_path / "results.jsonl"):
        assert main(["table", str(meant)]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'results.json'} is one evaluation" in error
        assert "takes the results.jsonl of a sweep" in error


def test_a_folder_without_model_and_tokenizer_is_not_asked_for_the_tokenizer_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for streamed in ([], ["--stream"]):
        assert main(["evaluate", "--model", str(tmp_path), "--schemes", "w8", *streamed]) == 2
        error = capsys.readouterr().err
        assert "holds no model (config.json) and no tokenizer (tokenizer.json)" in error


def test_a_folder_with_a_tokenizer_alone_or_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = ["evaluate", "--model", str(tmp_path), "--schemes", "w8"]
    for file in SMALL_OPT.glob("*token*"):
        shutil.copy(file, tmp_path)
    for streamed in ([], ["--stream"]):
        assert main([*evaluate, *streamed]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path} holds no model (config.json): model.save_pretrained" in error
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(evaluate) == 2
    assert "holds an adapter" in capsys.readouterr().err


def test_a_named_dataset_with_overlapping_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [f"Line {n} of the text is about {n} things." for n in range(12)]
    write_wikitext(tmp_path, {"test": texts, "train": texts * 3})
    options = ["--model", str(SMALL_OPT), "--schemes", "w8a8-static", "--dataset", "wikitext2"]
    options += ["--data", str(tmp_path), "--windows", "all", "--length", "32", "--stride", "20"]
    options += ["--calibration-windows", "2", "--output", str(tmp_path / "out")]
    assert main(["evaluate", *options]) == 0
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    protocol = data["provenance"]["protocol"]
    stream = small_opt()[1]("\n\n".join(texts))["input_ids"]
    assert protocol["windows"] == (len(stream) - 32) // 20 + 1
    assert (protocol["stride"], protocol["complete"]) == (20, True)
    assert data["rows"][1]["window_tokens"] == [31, *[20] * (protocol["windows"] - 1)]
    printed = capsys.readouterr().out
    assert "windows of 32 tokens, 20 apart, only new tokens scored, tail dropped" in printed
    assert "calibrated on 2 windows of 32 from wikitext2 (train, offsets)" in printed


def test_an_interrupted_sweep_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "mine.toml"
    file.write_text(f'models = ["{SMALL_OPT}"]\nschemes = ["w8"]\nlength = 48\nwindows = 2\n')
    monkeypatch.setattr("fxquant.evaluation.sweep.measure", interrupted)
    assert main(["sweep", str(file), "--output", str(tmp_path / "out")]) == 130
    assert "the same command goes on from there" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16", "utf-8"])
def test_a_table_is_printed_whatever_the_encoding(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    options = ["--schemes", "w8", "--windows", "1", "--length", "16", "--calibration-windows", "1"]
    assert main(["evaluate", "--model", str(SMALL_OPT), *options]) == 0
    stream.flush()
    printed = written.getvalue().decode(encoding)
    delta = "Δ".encode(encoding, "backslashreplace").decode(encoding)
    assert f"{delta}loss" in printed
    assert "\n| w8 " in printed.replace("\r", "")


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "no space left")


def test_a_standard_error_that_is_full_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", Full())
    options = ["--schemes", "w8", "--windows", "1", "--length", "16", "--calibration-windows", "1"]
    assert main(["evaluate", "--model", str(SMALL_OPT), *options]) == 0
    assert "\n| w8 " in capsys.readouterr().out
    assert main(["evaluate", "--model", "/nowhere", *options]) == 2
