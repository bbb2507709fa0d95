"""What the commands print of a graph's past, against what was done to it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxquant
from fxquant.checkpoint import manifest
from fxquant.cli.main import main
from fxquant.evaluation.gguf import WEIGHTS, in_words, tensor_types
from fxquant.evaluation.models import load_model
from fxquant.evaluation.results import Row, read_results
from fxquant.evaluation.source import load_text, tokens
from fxquant.ir.calibration import CalibrationRecord, calibration_words, versions
from fxquant.ir.graph import info, update_info
from tests.models import SMALL_OPT, small_opt
from tests.test_overlap import prose_file

LENGTH = 32
TOKENIZER = small_opt()[1]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prose_file(tmp_path_factory, 0, 900)


def convert(folder: Path, text: Path, *options: str, scheme: str = "w8a8-static") -> list[str]:
    """``fxquant convert`` into ``folder``; the command line."""
    command = ["convert", "--model", str(SMALL_OPT), "--scheme", scheme, "--text", str(text)]
    command += ["--length", str(LENGTH), "--calibration-windows", "3", "--output", str(folder)]
    command += options
    assert main(command) == 0
    return command


def evaluate(model: object, *options: str) -> list[str]:
    command = ["evaluate", "--model", str(model), "--length", str(LENGTH), *options]
    assert main(command) == 0
    return command


def only_row(folder: Path) -> tuple[Row, Any]:
    rows, made = read_results(folder / "results.json")
    return rows[-1], made


def record(row: Row) -> CalibrationRecord:
    assert row.calibration is not None
    (found,) = row.calibration
    return found


def test_a_saved_graph_carries_its_own_past(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """convert, save, evaluate under other settings, report: what was done, not what is asked."""
    saved, out = tmp_path / "saved", tmp_path / "out"
    asked = ["--windows", "4", "--seed", "7", "--calibration-length", "20"]
    done = convert(saved, text, *asked, scheme="w8a8-static+smooth")
    words = "3 windows of 20 from some.txt (rest of the text, grid)"
    assert f"calibrated on    {words}" in capsys.readouterr().out

    command = evaluate(saved, "--text", str(text), "--windows", "2", "--output", str(out))
    printed = capsys.readouterr().out
    row, made = only_row(out)
    found = record(row)
    assert f"calibrated on {words}, batch size 1" in printed
    assert (made.calibration, made.calibration_windows, made.seed) == (words, 3, 7)
    assert made.command == " ".join(["fxquant", *command])
    assert [each.name.partition("(")[0] for each in found.readings] == ["smooth", "calibrate"]
    assert (found.dtype, found.device, found.versions) == ("float32", "cpu", versions())

    origin = found.origin
    assert origin is not None
    assert (origin.seed, origin.length, origin.sampler, origin.split) == (
        7,
        20,
        "grid",
        "rest of the text",
    )
    assert origin.command == " ".join(["fxquant", *done])
    assert origin.text_hash == load_text(str(text)).digest
    stream = tokens(text.read_text(), TOKENIZER)
    ids = [stream[first:end] for _, first, end in origin.spans.spans]
    held_out = 4 * LENGTH
    assert all(first >= held_out and end - first == 20 for _, first, end in origin.spans.spans)
    again = load_model(str(SMALL_OPT)).graph
    same = fxquant.convert(again, row.scheme, calibration=[each[None] for each in ids])
    assert info(same).calibration is not None
    assert info(same).calibration[0].ids_hash == found.ids_hash  # type: ignore[index]

    page = tmp_path / "page.html"
    assert main(["report", str(out), "--output", str(page)]) == 0
    assert words in page.read_text()
    table = (out / "table.md").read_text()
    assert table.count(words) == 1  # in the line; the rest of the record below it
    assert f"calibration of {row.scheme}: {found.details()}" in table


def test_saved_and_fresh_results_have_the_same_fields(text: Path, tmp_path: Path) -> None:
    saved, old, new = (tmp_path / name for name in ("saved", "old", "new"))
    convert(saved, text, "--windows", "2")
    common = ["--text", str(text), "--windows", "2"]
    evaluate(saved, *common, "--output", str(old))
    fresh = ["--schemes", "w8a8-static", "--calibration-windows", "3", "--output", str(new)]
    evaluate(SMALL_OPT, *common, *fresh)
    (a, was), (b, now) = only_row(old), only_row(new)
    assert (a.loss, a.overlap) == (b.loss, b.overlap)
    assert (was.calibration, was.windows_hash) == (now.calibration, now.windows_hash)
    assert replace(record(a).origin, command="") == replace(record(b).origin, command="")  # type: ignore[type-var]
    data = [json.loads((each / "results.json").read_text()) for each in (old, new)]
    fields = [(set(each["provenance"]), set(each["rows"][-1])) for each in data]
    assert fields[0] == fields[1]


@pytest.mark.parametrize(
    ("scheme", "readers"),
    [
        ("w8", []),
        ("w8+equalize", []),
        ("w4+gptq", ["gptq"]),
        ("w8a8-dynamic+smooth", ["smooth"]),
        ("w4-g32+awq", ["awq"]),
        ("w8a8-static+smooth+correct_bias", ["smooth", "calibrate", "correct_bias"]),
    ],
)
def test_only_what_read_data_is_calibrated(
    scheme: str, readers: list[str], text: Path, tmp_path: Path
) -> None:
    fresh, saved, out = (tmp_path / name for name in ("fresh", "saved", "out"))
    convert(saved, text, "--windows", "2", scheme=scheme)
    common = ["--text", str(text), "--windows", "2"]
    options = ["--schemes", scheme, "--calibration-windows", "3", "--output", str(fresh)]
    evaluate(SMALL_OPT, *common, *options)
    evaluate(saved, *common, "--output", str(out))
    for folder in (fresh, out):
        row, made = only_row(folder)
        assert row.calibration is not None
        names = [one.name.partition("(")[0] for each in row.calibration for one in each.readings]
        assert names == readers
        assert (made.calibration == "nothing") == (not readers)
        assert made.calibration_windows == (3 if readers else 0)
    assert only_row(out)[1].seed == (0 if readers else None)


def test_a_line_says_which_of_the_rows_were_calibrated(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--schemes", "w8", "w8a8-static", "--windows", "2", "--calibration-windows", "2"]
    evaluate(SMALL_OPT, "--text", str(text), *options)
    said = "calibrated on 2 windows of 32 from some.txt (rest of the text, grid) for w8a8-static,"
    assert said in capsys.readouterr().out


def test_bare_tensors_are_known_by_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = small_opt()
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randint(3, 500, (2, 10 + n // 2), generator=draw) for n in range(4)]
    graph = fxquant.convert(model, "w8a8-static", calibration=iter(batches))
    (found,) = info(graph).calibration or ()
    assert found.shapes == ((2, 2, 10), (2, 2, 11))
    assert (found.tokens, found.origin) == (sum(each.numel() for each in batches), None)
    fxquant.save(graph, tmp_path / "saved", tokenizer)
    evaluate(tmp_path / "saved", "--windows", "2", "--output", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert (
        f"calibrated on 8 rows of 10 to 11 tokens of unknown text ({found.ids_hash[:23]})"
        in printed
    )
    assert "seed unknown" in printed
    _, made = only_row(tmp_path / "out")
    assert (made.seed, made.calibration_windows) == (None, 8)
    assert "seed and command unknown" in printed


def test_padding_is_not_counted_and_prefixes_are_one_record() -> None:
    model, _ = small_opt()
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids.flip(0)}]
    graph = fxquant.convert(model, "w4-g32/a8-static+awq(tokens=8)", calibration=batches)
    (found,) = info(graph).calibration or ()
    assert found.tokens == 2 * ids.numel() - 9
    assert found.readings[-1].batches == 2


def test_a_graph_that_does_not_say_is_unknown(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As versions wrote it that kept nothing."""
    saved = tmp_path / "saved"
    convert(saved, text)
    file = saved / "graph.json"
    data = json.loads(file.read_text())
    for name in ("calibration", "weights"):
        del data["info"][name]
    file.write_text(json.dumps(data, separators=(",", ":")))
    (saved / manifest.MANIFEST).unlink()
    manifest.write_manifest(saved)
    evaluate(saved, "--text", str(text), "--windows", "2", "--output", str(tmp_path / "out"))
    row, made = only_row(tmp_path / "out")
    assert row.calibration is None
    assert (made.calibration_windows, made.seed, made.weights) == (None, None, "")
    printed = capsys.readouterr().out
    assert "calibrated on unknown data, batch size 1" in printed
    assert "seed unknown" in printed
    assert "calibrated on    unknown data" in str(fxquant.inspect(fxquant.load(saved)))
    again = fxquant.load(saved)
    update_info(again, calibration=None)
    assert calibration_words(info(again).calibration) == "unknown data"


def test_inspect_says_what_was_read(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(SMALL_OPT), "--text", str(text), "--length", str(LENGTH)]
    options += ["--windows", "5", "--calibration-windows", "2", "--seed", "3", "--format", "json"]
    assert main(["inspect", "--scheme", "w8a8-static", *options]) == 0
    (found,) = json.loads(capsys.readouterr().out)["calibration"]
    assert found["origin"]["seed"] == 3
    assert min(first for _, first, _ in found["origin"]["spans"]["spans"]) >= 5 * LENGTH
    assert main(["inspect", "--scheme", "w8", *options]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"] == []


def test_explain_and_plan_say_what_they_read(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a run that goes on: under the command that went on."""
    common = ["--model", str(SMALL_OPT), "--text", str(text), "--length", str(LENGTH)]
    common += ["--calibration-windows", "2", "--windows", "3", "--seed", "4"]
    explain = ["explain", *common, "--scheme", "w8a8-static", "--methods", "in_order"]
    explain += ["--worst", "0", "--sites", "*layers.0*", "--output", str(tmp_path / "e")]
    said = "calibrated on 2 windows of 32 from some.txt (rest of the text, grid)"
    for argv in (explain, [*explain, "--worst", "0"]):
        monkeypatch.setattr(sys, "argv", ["host", "--of", "its own"])
        assert main(argv) == 0
        assert said in capsys.readouterr().out
        data = json.loads((tmp_path / "e" / "explanation.json").read_text())
        made, (found,) = data["provenance"], data["calibration"]
        assert made["command"] == "fxquant " + " ".join(argv).replace("*layers.0*", "'*layers.0*'")
        assert (made["seed"], made["calibration_windows"], made["windows"]) == (4, 2, 3)
        assert min(first for _, first, _ in found["origin"]["spans"]["spans"]) >= 3 * LENGTH
    weights = [*explain, "--scheme", "w8", "--output", str(tmp_path / "w")]
    assert main(weights) == 0
    assert "calibrated on nothing" in capsys.readouterr().out
    assert main([*weights, "--worst", "2"]) == 0  # other choices of weights read nothing either
    assert "calibrated on nothing" in capsys.readouterr().out
    assert json.loads((tmp_path / "w" / "explanation.json").read_text())["calibration"] == []
    dynamic = [*weights, "--scheme", "w8a8-dynamic", "--worst", "1"]  # smoothing reads
    assert main(dynamic) == 0
    assert said in capsys.readouterr().out
    plan = ["plan", *common, "--budget", "9", "--output", str(tmp_path / "p"), "--choices", "w8"]
    for choice, expected in (("fp", "nothing"), ("w8a8-static", said[14:])):
        assert main([*plan, choice]) == 0
        data = json.loads((tmp_path / "p" / "plan.json").read_text())
        assert data["provenance"]["calibration"] == expected
        assert len(data["calibration"]) == (expected != "nothing")


def test_a_sweep_says_it_of_each_cell(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "mine.toml", tmp_path / "out"
    file.write_text(
        f'models = ["{SMALL_OPT}"]\nschemes = ["w8+equalize", "w8a8-static"]\n'
        f'datasets = ["{text}"]\nlength = {LENGTH}\nwindows = 2\ncalibration_windows = 2\n'
        "seeds = [1, 2]\n"
    )
    assert main(["sweep", str(file), "--output", str(out)]) == 0
    capsys.readouterr()
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    said = [(line["scheme"], line["seed"], line["provenance"]["calibration"]) for line in lines]
    words = "2 windows of 32 from some.txt (rest of the text, grid)"
    assert sorted(said, key=str) == sorted(
        [
            ("fp", None, "nothing"),
            ("w8+equalize", None, "nothing"),
            ("w8a8-static", 1, words),
            ("w8a8-static", 2, words),
        ],
        key=str,
    )
    for line in lines:
        for found in line["figures"]["calibration"]:
            assert found["origin"]["seed"] == line["seed"]
            assert found["origin"]["command"] == f"fxquant sweep {file} --output {out}"
    assert main(["table", str(out / "results.jsonl")]) == 0
    assert f"calibrated on {words}; batch size 1" in capsys.readouterr().out


# --- weights that were coarser before -------------------------------------------------------------


def test_tensor_types_are_those_of_the_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("a", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("b", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    counts = tensor_types(tmp_path / "tiny.gguf")
    assert counts == {"Q4_1": 256, "F32": 64}
    described = "80.00% Q4_1 (groups of 32 with at most 16 values each), 20.00% F32"
    assert in_words(counts) == f"dequantized from GGUF: {described}"
    assert in_words({"F16": 3}) == "read from GGUF: 100.00% F16"


def test_the_weights_past_goes_all_the_way(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, saved, out = (tmp_path / name for name in ("model", "saved", "out"))
    shutil.copytree(SMALL_OPT, model)
    (model / WEIGHTS).write_text(json.dumps({"Q4_1": 300, "F32": 100}))
    said = "dequantized from GGUF: 75.00% Q4_1 (groups of 32 with at most 16 values each), "
    common = ["--text", str(text), "--windows", "2", "--output", str(out)]
    evaluate(model, "--schemes", "w8", *common)
    assert f"weights {said}" in capsys.readouterr().out
    assert said in (out / "table.md").read_text()
    assert main(["convert", "--model", str(model), "--scheme", "w8", "--output", str(saved)]) == 0
    assert said[:60] in re.sub(r"\s+", " ", capsys.readouterr().out)
    evaluate(saved, *common, "--overwrite")
    assert only_row(out)[1].weights.startswith(said)
    printed = capsys.readouterr().out
    assert f"The weights of {saved} are {said}" in printed
    assert main(["report", str(out)]) == 0
    assert said in (out / "report.html").read_text()
