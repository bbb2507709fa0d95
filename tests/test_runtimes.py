"""Exported models in their engines: rows beside the graphs', in evaluations, sweeps and reports."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

import fxquant
from fxquant.cli.main import main
from fxquant.errors import DataError, ExportError
from fxquant.evaluation.journal import read_journal
from fxquant.evaluation.report.page import write_report
from fxquant.evaluation.results import read_results
from fxquant.evaluation.sweep_tables import format_results
from fxquant.exports import compressed_tensors, runtimes
from fxquant.exports.runtimes import RUNTIMES, runtime_named
from fxquant.schemes.scheme import Scheme
from tests.architectures import llama, token_ids
from tests.models import SMALL_OPT, small_opt

ENGINES = pytest.mark.needs_program(
    all(find_spec(name) for name in ("onnxruntime", "compressed_tensors")), "the exports extra"
)
NVFP4 = str(Scheme.parse("nvfp4"))
SHORT = ["--windows", "2", "--length", "40", "--calibration-windows", "2"]


def evaluated(folder: Path, *options: str, model: Path = SMALL_OPT) -> int:
    return main(["evaluate", "--model", str(model), *SHORT, "--output", str(folder), *options])


@ENGINES
def test_a_row_of_the_engine_stands_beside_the_graphs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--schemes", "w8a8-dynamic-token", "--runtime", "onnxruntime")
    assert evaluated(tmp_path / "out", *asked) == 0
    rows, made = read_results(tmp_path / "out" / "results.json")
    engine = RUNTIMES["onnxruntime"].engine()
    assert [(row.scheme, row.engine) for row in rows] == [
        ("fp", ""),
        ("w8a8-dynamic-token", ""),
        ("w8a8-dynamic-token", engine),
    ]
    assert abs(rows[2].loss - rows[1].loss) < 2e-3
    assert rows[2].loss != rows[0].loss
    assert rows[2].delta_error is not None
    assert engine in made.engine
    assert "accuracy_level=1" in made.engine
    table = (tmp_path / "out" / "table.md").read_text()
    said = capsys.readouterr().out
    for text in (table, said):
        assert f"w8a8-dynamic-token [in {engine}]" in text
        assert f"exported to {engine}" in text
    assert f"{engine} less the graph itself, nats a token: w8a8-dynamic-token" in said
    write_report(tmp_path / "out", tmp_path / "report.html")
    assert f"w8a8-dynamic-token in {engine}" in (tmp_path / "report.html").read_text()


@ENGINES
def test_an_export_is_measured_where_it_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = small_opt()
    text = fxquant.windows("builtin", tokenizer, count=2, length=40, calibration=2)
    graph = fxquant.convert(model, "w8a8-static", calibration=text.batches)
    folder = compressed_tensors(graph, tmp_path / "ct", tokenizer=tokenizer, check=False).path
    capsys.readouterr()
    assert evaluated(tmp_path / "out", "--runtime", "transformers", model=folder) == 0
    (row,), made = read_results(tmp_path / "out" / "results.json")
    assert (row.scheme, row.engine) == ("w8a8-static", RUNTIMES["transformers"].engine())
    assert made.model == str(folder)
    assert "2 windows of 40 from builtin" in made.calibration
    inside, beside = (
        fxquant.evaluate(each, text, runtime="transformers") for each in (folder, graph)
    )
    assert inside.loss == pytest.approx(row.loss, rel=1e-12)
    assert inside.loss == pytest.approx(beside.loss, rel=1e-12)
    assert f"in {row.engine}" in str(inside)
    assert (inside - fxquant.evaluate(graph, text)).delta != 0  # its own rule for static codes
    assert "%|" not in capsys.readouterr().err  # a library's bars
    for options, said in (
        ((), "is an export to compressed-tensors: give --runtime transformers or vllm"),
        (("--runtime", "onnxruntime"), "does not run: runtime transformers or vllm does"),
        (("--runtime", "transformers", "--schemes", "w8"), "leave out --schemes"),
    ):
        assert evaluated(tmp_path / "other", *options, model=folder) == 2
        assert said in capsys.readouterr().err


@ENGINES
def test_windows_that_an_export_was_calibrated_on_are_refused(tmp_path: Path) -> None:
    model, tokenizer = small_opt()
    text = fxquant.windows("builtin", tokenizer, count=2, length=40, calibration=0)
    graph = fxquant.convert(model, "w8a8-static", calibration=text.evaluation)
    folder = compressed_tensors(graph, tmp_path / "ct", tokenizer=tokenizer, check=False).path
    with pytest.raises(DataError, match="what the graph was calibrated on"):
        fxquant.evaluate(folder, text, runtime="transformers")
    assert evaluated(tmp_path / "out", "--runtime", "transformers", model=folder) == 2


@ENGINES
def test_a_sweep_goes_on_with_its_engine_cells(tmp_path: Path) -> None:
    file, out = tmp_path / "s.toml", tmp_path / "out"
    common = f'models = ["{SMALL_OPT}"]\nwindows = 1\nlength = 40\ncalibration_windows = 2\n'
    file.write_text(common + 'schemes = ["w8"]\n')
    assert main(["sweep", str(file), "--output", str(out)]) == 0
    before = (out / "results.jsonl").read_text()
    wanted = 'schemes = ["w8", "w8a8-dynamic+attn8"]\nruntime = "transformers"\n'
    file.write_text(common + wanted)
    assert main(["sweep", str(file), "--output", str(out)]) == 1
    assert (out / "results.jsonl").read_text().startswith(before)
    found = read_journal(out / "results.jsonl")
    engine = RUNTIMES["transformers"].engine()
    assert [(each.scheme, each.engine, each.error is None) for each in found] == [
        ("fp", "", True),
        ("w8", "", True),
        ("w8", engine, True),
        ("w8a8-dynamic+attn8", "", True),
        ("w8a8-dynamic+attn8", engine, False),
    ]
    text = format_results(found)
    assert f"w8 [in {engine}]" in text
    assert f"w8a8-dynamic+attn8 in {engine}: compressed-tensors cannot hold" in text
    assert text.count("| scheme") == 1  # one group
    kept = (out / "results.jsonl").read_text()
    assert main(["sweep", str(file), "--output", str(out)]) == 1
    assert (out / "results.jsonl").read_text() == kept


@pytest.mark.parametrize(
    ("schemes", "runtime", "said"),
    [
        (["w8", "w8a8-dynamic+attn8"], "transformers", "attention's products"),
        (
            ["fp", "w8"],
            "transformers",
            "no model in float: give schemes such as w8 and leave",
        ),
        (["w4-g32/a8-dynamic-token"], "onnxruntime", "scale for each group"),
    ],
)
@ENGINES
def test_what_cannot_be_held_is_refused_before_any_row(
    schemes: list[str], runtime: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluated(out, "--schemes", *schemes, "--runtime", runtime) == 2
    assert said in capsys.readouterr().err
    assert not out.exists() or json.loads((out / "results.json").read_text())["rows"] == []


def test_a_runtime_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in RUNTIMES:
        with pytest.raises(ExportError, match=rf"runtime {name} needs .* to be installed: pip"):
            runtime_named(name)
    with pytest.raises(ExportError, match="known are onnxruntime, transformers, vllm"):
        runtime_named("llamacpp")


def test_a_damaged_record_is_said(tmp_path: Path) -> None:
    record = {"format": "fxquant export", "target": "onnx", "model": "m", "scheme": "w8"}
    (tmp_path / "fxquant_export.json").write_text(json.dumps(record))
    with pytest.raises(ExportError, match=r"vocab_size.*missing"):
        runtimes.read_facts(tmp_path, RUNTIMES["onnxruntime"])
    more = {"vocab_size": 5, "max_positions": None, "weights": "", "calibration": None}
    (tmp_path / "fxquant_export.json").write_text(json.dumps({**record, **more, "scheme": "w99"}))
    with pytest.raises(ExportError, match=r"bits must be 2..8, got 99; export again"):
        runtimes.read_facts(tmp_path, RUNTIMES["onnxruntime"])


@pytest.mark.parametrize("level", ["qdq", "kernels"])
def test_an_engine_runs_no_level(level: str) -> None:
    with pytest.raises(ExportError, match=f"runs no graph at level {level}"):
        fxquant.evaluate(llama(), token_ids(2, 9), runtime="onnxruntime", level=level)


@ENGINES
def test_what_the_format_fixes_is_read_from_the_windows_to_calibrate_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """NVFP4 has a global scale of an input in a file, which the graph chooses on each call."""
    asked = ("--schemes", "nvfp4", "w8", "--runtime", "transformers")
    assert evaluated(tmp_path / "out", *asked) == 0
    engine = RUNTIMES["transformers"].engine()
    assert f"from builtin (calibration topics, grid) for {NVFP4} in {engine}" in (
        " ".join(capsys.readouterr().out.split())
    )
    rows, made = read_results(tmp_path / "out" / "results.json")
    found = {(row.scheme, bool(row.engine)): row for row in rows}
    graph, inside = found[NVFP4, False], found[NVFP4, True]
    assert graph.calibration == found["w8", True].calibration == ()
    assert inside.calibration is not None
    assert [record.tokens for record in inside.calibration] == [80]
    assert inside.overlap == ()
    assert inside.loss != graph.loss
    assert made.seed == 0

    model, tokenizer = small_opt()
    loaded = fxquant.load_model(SMALL_OPT)
    text = fxquant.windows("builtin", tokenizer, count=2, length=40, calibration=2)
    folder = tmp_path / "export"
    compressed_tensors(
        loaded.model, folder, scheme="nvfp4", calibration=text.batches, tokenizer=tokenizer
    )
    for source in (folder, fxquant.convert(model, "nvfp4")):
        again = fxquant.evaluate(source, text, runtime="transformers")
        # A scale is read behind sums in another order at level qdq: its last bit may be another's.
        assert abs(again.loss - inside.loss) < abs(inside.loss - graph.loss) / 10
        assert "2 windows of 40 from builtin" in again.calibration
    bare = fxquant.windows("builtin", tokenizer, count=2, length=40, calibration=0)
    with pytest.raises(ExportError, match="none are given"):
        fxquant.evaluate(fxquant.convert(model, "nvfp4"), bare, runtime="transformers")
    none = ("--calibration-windows", "0")
    assert evaluated(tmp_path / "none", *asked, *none) == 2
    assert "global scale of an input is fixed there" in capsys.readouterr().err


@ENGINES
def test_of_a_sweep_an_engines_cell_has_a_seed_where_its_format_reads_data(tmp_path: Path) -> None:
    file, out = tmp_path / "s.toml", tmp_path / "out"
    file.write_text(
        f'models = ["{SMALL_OPT}"]\nwindows = 1\nlength = 40\ncalibration_windows = 1\n'
        'seeds = [0, 1]\nschemes = ["nvfp4"]\nruntime = "transformers"\n'
    )
    assert main(["sweep", str(file), "--output", str(out)]) == 0
    found = read_journal(out / "results.jsonl")
    assert [(each.scheme, bool(each.engine), each.seed) for each in found] == [
        ("fp", False, None),
        (NVFP4, False, None),
        (NVFP4, True, 0),
        (NVFP4, True, 1),
    ]
    assert all(each.error is None for each in found)
