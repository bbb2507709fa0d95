"""Every field of every provenance, in each command and along chains, against what was done.

What was done is computed here from the files alone: hashes, tokens, windows, shapes, versions.
"""

from __future__ import annotations

import hashlib
import html
import importlib.metadata
import json
import re
import shlex
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.cli.main import main
from fxquant.evaluation.protocol import Protocol
from fxquant.evaluation.provenance import Provenance
from fxquant.ir.calibration import CalibrationRecord, calibration_words
from fxquant.ir.graph import info, update_info
from tests.models import SMALL_OPT, small_opt
from tests.test_overlap import prose_file

LENGTH = 24
TOKENIZER = small_opt()[1]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prose_file(tmp_path_factory, 3, 700)


def sha(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def weights_hash(directory: Path) -> str:
    files = sorted(directory.glob("*.safetensors"))
    lines = (f"{f.name} {hashlib.sha256(f.read_bytes()).hexdigest()}\n" for f in files)
    return sha("".join(lines).encode())


def stream(text: Path) -> Tensor:
    return torch.tensor(TOKENIZER(text.read_text(), verbose=False)["input_ids"])


def truth(text: Path, command: list[str], **other: Any) -> dict[str, Any]:
    """The provenance of ``command`` on the first ``windows`` windows of the text."""
    done: dict[str, Any] = {"windows": 2, "length": LENGTH, "stride": None, "model": str(SMALL_OPT)}
    done |= other
    windows, length = done["windows"], done["length"]
    step = done.pop("stride") or length
    ids = torch.stack([stream(text)[n * step :][:length] for n in range(windows)])
    config = json.loads((SMALL_OPT / "config.json").read_text())
    names = ("fxquant", "torch", "transformers", "datasets", "tokenizers")
    return {
        "revision": weights_hash(Path(done["model"])),
        "architecture": f"opt {config['num_hidden_layers']}x{config['hidden_size']}",
        "dataset": text.name,
        "text_hash": sha(text.read_bytes() + b"\0"),
        "windows_hash": sha(f"{list(ids.shape)}".encode() + ids.numpy().tobytes()),
        "protocol": {
            "dataset": text.name,
            "split": "whole text",
            "join": "",
            "selection": "all documents",
            "tokenizer": f"fast {type(TOKENIZER).__name__}",
            "bos": "none",
            "length": length,
            "stride": step,
            "windows": windows,
            "complete": False,
            "tail": "dropped",
        },
        "calibration": "nothing",
        "calibration_windows": 0,
        "batch_size": 1,
        "dtype": "float32",
        "device": "cpu",
        "seed": None,
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "command": shlex.join(["fxquant", *command]),
        "processes": 1,
        "weights": "",
        "engine": "",
        "level": "integer",
        **done,
    }


def calibrated(count: int, seed: int, length: int = LENGTH) -> dict[str, Any]:
    words = f"{count} windows of {length} from some.txt (rest of the text, grid)"
    return {"calibration": words, "calibration_windows": count, "seed": seed}


def check_record(record: dict[str, Any], text: Path, held_out: int, **origin: Any) -> None:
    """A record's text, seed, spans and hash of tokens, read again from the text."""
    made = record["origin"]
    spans = made["spans"]["spans"]
    assert {name: made[name] for name in origin} == origin
    assert made["text_hash"] == sha(text.read_bytes() + b"\0")
    assert min(first for _, first, _ in spans) >= held_out
    rows = [stream(text)[first:end][None] for _, first, end in spans]
    content = b"".join(f"{list(row.shape)}".encode() + row.numpy().tobytes() for row in rows)
    assert record["ids_hash"] == sha(content)
    assert record["tokens"] == sum(row.numel() for row in rows)


def written(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    data = json.loads((folder / "results.json").read_text())
    return data["provenance"], data["rows"]


def common(text: Path, model: object = SMALL_OPT, windows: int = 2) -> list[str]:
    options = ["--model", str(model), "--text", str(text), "--length", str(LENGTH)]
    return [*options, "--windows", str(windows)]


def run(command: list[str]) -> list[str]:
    assert main(command) == 0
    return command


def test_the_truth_has_every_field(text: Path) -> None:
    made = truth(text, [])
    assert set(made) == {field.name for field in fields(Provenance)}
    assert set(made["protocol"]) == {field.name for field in fields(Protocol)}


@pytest.mark.parametrize(
    ("schemes", "options", "done"),
    [
        (["w8"], ["--seed", "5"], {}),
        (["w8", "w8+equalize"], ["--seed", "5"], {}),
        (["w8a8-static"], ["--seed", "5"], calibrated(3, 5)),
        (["w4+gptq"], ["--seed", "5", "--calibration-length", "16"], calibrated(3, 5, 16)),
        (["w8"], ["--stride", "8", "--batch-size", "2"], {"stride": 8, "batch_size": 2}),
        (["w8a8-static"], ["--dtype", "bfloat16"], {"dtype": "bfloat16"} | calibrated(3, 0)),
    ],
)
def test_evaluate(
    schemes: list[str],
    options: list[str],
    done: dict[str, Any],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["evaluate", *common(text), "--calibration-windows", "3", *options]
    command += ["--schemes", *schemes, "--output", str(tmp_path)]
    run(command)
    made, rows = written(tmp_path)
    assert made == truth(text, command, **done)
    for row in rows:
        for record in row["calibration"]:
            check_record(record, text, 2 * LENGTH, seed=made["seed"], command=made["command"])
            assert (record["dtype"], record["device"]) == (made["dtype"], "cpu")
    printed = capsys.readouterr().out
    line = Provenance.from_json(made).line()
    for shown in (printed, (tmp_path / "table.md").read_text()):
        assert line in shown
    seed = "no seed" if made["seed"] is None else f"seed {made['seed']}"
    assert f", {seed}; " in line
    check_page(tmp_path, made)


def check_page(folder: Path, made: dict[str, Any]) -> None:
    """The report shows each field, as it stands in the file."""
    run(["report", str(folder)])
    page = html.unescape((folder / "report.html").read_text())
    flat = {**made, **made["protocol"], **made["versions"]}
    for name, value in flat.items():
        if isinstance(value, str) and value:
            assert value in page, name
        if isinstance(value, int) and not isinstance(value, bool):
            assert re.search(rf"\b{value:,}\b", page), name


@pytest.mark.parametrize(
    ("scheme", "reads"), [("w8a8-static", True), ("w8a8-dynamic+smooth", True), ("w4", False)]
)
def test_convert_save_evaluate_report(
    scheme: str, reads: bool, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, out = tmp_path / "saved", tmp_path / "out"
    convert = ["convert", *common(text, windows=4), "--scheme", scheme, "--seed", "7"]
    convert += ["--calibration-windows", "3", "--output", str(saved)]
    run(convert)
    expected = calibrated(3, 7) if reads else {"calibration": "nothing"}
    assert f"calibrated on    {expected['calibration']}" in capsys.readouterr().out
    command = ["evaluate", *common(text, saved, windows=3), "--seed", "1", "--output", str(out)]
    run(command)
    made, (row,) = written(out)
    assert made == truth(text, command, windows=3, model=str(saved), **expected)
    assert row["overlap"] == []
    assert len(row["calibration"]) == reads
    for record in row["calibration"]:
        check_record(record, text, 4 * LENGTH, seed=7, command=shlex.join(["fxquant", *convert]))
    check_page(out, made)
    table = (out / "table.md").read_text()
    assert table.count(expected["calibration"]) == 1
    capsys.readouterr()
    run(["inspect", "--model", str(saved), "--format", "json"])
    shown = json.loads(capsys.readouterr().out)["calibration"]
    assert [record["ids_hash"] for record in shown] == [r["ids_hash"] for r in row["calibration"]]
    for record in shown:
        check_record(record, text, 4 * LENGTH, seed=7)


def test_inspect(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["inspect", *common(text), "--calibration-windows", "2", "--seed", "9"]
    run([*command, "--scheme", "w8a8-static+smooth", "--format", "json"])
    (record,) = json.loads(capsys.readouterr().out)["calibration"]
    check_record(record, text, 2 * LENGTH, seed=9, length=LENGTH, sampler="grid")
    readers = [each["name"].partition("(")[0] for each in record["readings"]]
    assert readers == ["smooth", "calibrate"]


def test_sweep_table_report(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "mine.toml", tmp_path / "out"
    file.write_text(
        f'models = ["{SMALL_OPT}"]\nschemes = ["w8", "w8a8-static"]\ndatasets = ["{text}"]\n'
        f"length = {LENGTH}\nwindows = 2\ncalibration_windows = 2\nseeds = [4, 6]\n"
    )
    command = ["sweep", str(file), "--output", str(out)]
    run(command)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        done = calibrated(2, line["seed"]) if line["scheme"] == "w8a8-static" else {}
        assert line["provenance"] == truth(text, command, **done)
        for record in line["figures"]["calibration"]:
            check_record(record, text, 2 * LENGTH, seed=line["seed"])
    capsys.readouterr()
    run(["table", str(out / "results.jsonl")])
    made = truth(text, command, **calibrated(2, 4))
    title = capsys.readouterr().out.splitlines()[0]
    names = ("model", "architecture", "calibration", "dtype", "device", "dataset")
    for value in (*(made[name] for name in names), *made["versions"].values()):
        assert value in title
    assert made["text_hash"][:23] in title
    assert f"float32 on cpu at level integer; fxquant {made['versions']['fxquant']}" in title
    run(["report", str(out)])
    page = html.unescape((out / "report.html").read_text())
    for value in (made["calibration"], made["windows_hash"], made["revision"], "4, 6"):
        assert value in page


def test_explain_goes_on_and_says_what_was_done_then(text: Path, tmp_path: Path) -> None:
    """In one folder: the same again, more of it, and under another seed."""
    explain = ["explain", *common(text), "--calibration-windows", "2", "--methods", "in_order"]
    explain += ["--scheme", "w8a8-static", "--sites", "*layers.0*", "--worst", "0"]
    for seed, more in ((4, []), (4, ["--worst", "1"]), (5, [])):
        command = [*explain, "--seed", str(seed), *more, "--output", str(tmp_path)]
        run(command)
        data = json.loads((tmp_path / "explanation.json").read_text())
        assert data["provenance"] == truth(text, command, level="qdq", **calibrated(2, seed))
        (record,) = data["calibration"]
        check_record(record, text, 2 * LENGTH, seed=seed, command=data["provenance"]["command"])
        report = (tmp_path / "report.md").read_text()
        assert Provenance.from_json(data["provenance"]).line() in report
    run(["report", str(tmp_path)])
    page = html.unescape((tmp_path / "report.html").read_text())
    for value in (data["provenance"]["calibration"], data["provenance"]["windows_hash"]):
        assert value in page
    weights = [*explain, "--scheme", "w8", "--output", str(tmp_path / "w")]
    run(weights)
    data = json.loads((tmp_path / "w" / "explanation.json").read_text())
    assert data["provenance"] == truth(text, weights, level="qdq")


def test_plan_and_what_is_converted_by_it(text: Path, tmp_path: Path) -> None:
    plan = ["plan", *common(text), "--calibration-windows", "2", "--seed", "8", "--budget", "9"]
    plan += ["--choices", "w8a8-static", "fp", "--output", str(tmp_path / "p")]
    run(plan)
    data = json.loads((tmp_path / "p" / "plan.json").read_text())
    assert data["provenance"] == truth(text, plan, **calibrated(2, 8))
    out = tmp_path / "out"
    evaluate = ["evaluate", *common(text), "--calibration-windows", "3", "--seed", "2"]
    evaluate += ["--schemes", str(tmp_path / "p" / "scheme.json"), "--output", str(out)]
    run(evaluate)
    made, rows = written(out)
    assert made == truth(text, evaluate, **calibrated(3, 2))
    check_record(rows[-1]["calibration"][0], text, 2 * LENGTH, seed=2)
    assert (data["chosen_on"]["windows"], data["held_out"]["windows"]) == (2, 4)
    scheme = str(tmp_path / "p" / "scheme.json")
    assert json.loads(Path(scheme).read_text())["made_by"]["provenance"] == data["provenance"]
    convert = ["convert", *common(text), "--calibration-windows", "3", "--seed", "5"]
    run([*convert, "--scheme", scheme, "--output", str(tmp_path / "s")])
    command = ["evaluate", *common(text, tmp_path / "s"), "--output", str(tmp_path / "t")]
    run(command)
    made, (row,) = written(tmp_path / "t")
    assert made == truth(text, command, model=str(tmp_path / "s"), **calibrated(3, 5))
    check_record(row["calibration"][0], text, 2 * LENGTH, seed=5)


# --- several calibrations of one graph ------------------------------------------------------------


def record(ids: str, seed: int | None) -> CalibrationRecord:
    """Of two rows; made from that of a graph, with other ids."""
    model, tokenizer = small_opt()
    cut = fxquant.windows("builtin", tokenizer, count=1, length=16, calibration=2, seed=seed or 0)
    given = cut.batches if seed is not None else cut.calibration
    (found,) = info(fxquant.convert(model, "w8a8-static", calibration=given)).calibration or ()
    return replace(found, ids_hash=ids)


def test_records_of_the_same_ids_are_said_once(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = small_opt()
    words = "2 windows of 16 from builtin (calibration topics, grid)"
    drawn, bare = record("sha256:" + "a" * 64, 0), record("sha256:" + "a" * 64, None)
    for both in ((drawn, bare), (bare, drawn), (drawn, drawn)):
        assert calibration_words(both) == words
    other = record("sha256:" + "b" * 64, 1)
    said = calibration_words((drawn, other))
    assert said == (
        f"{words[:-1]}, seed 0, sha256:{'a' * 16}) and {words[:-1]}, seed 1, sha256:{'b' * 16})"
    )
    cases = (((drawn, bare), words, 0, "seed 0"), ((drawn, other), said, None, "several seeds"))
    for number, (records, expected, seed, seeds) in enumerate(cases):
        graph = fxquant.convert(model, "w8")
        update_info(graph, calibration=records)
        saved, out = tmp_path / f"saved{number}", tmp_path / f"out{number}"
        fxquant.save(graph, saved, tokenizer)
        command = ["evaluate", *common(text, saved), "--output", str(out)]
        run(command)
        made, _ = written(out)
        windows = 2 * len({each.ids_hash for each in records})
        done = {"calibration": expected, "calibration_windows": windows, "seed": seed}
        assert made == truth(text, command, model=str(saved), **done)
        assert f", {seeds}; " in capsys.readouterr().out
        assert (out / "table.md").read_text().count(f"{drawn.ids_hash[:23]}, read by") == 1


def test_what_cannot_be_told_is_said(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A saved graph that was calibrated on rows too short to be found again."""
    model, tokenizer = small_opt()
    rows = torch.randint(4, 1000, (3, 5), generator=torch.Generator().manual_seed(5))
    fxquant.save(fxquant.convert(model, "w8a8-static", calibration=rows), tmp_path / "s", tokenizer)
    run(["evaluate", *common(text, tmp_path / "s"), "--output", str(tmp_path / "out")])
    made, (row,) = written(tmp_path / "out")
    assert row["overlap"] is None
    said = "overlap with the calibration not checked"
    assert f"w8a8-static [{said}]" in capsys.readouterr().out
    assert f"w8a8-static: {said}: nothing tells" in (tmp_path / "out" / "table.md").read_text()
    check_page(tmp_path / "out", made)
    assert said in (tmp_path / "out" / "report.html").read_text()
    assert asdict(Provenance.from_json(made)) == made
