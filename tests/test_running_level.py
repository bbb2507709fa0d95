"""The level at which graphs are measured: chosen by device or asked for, said by every row."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fxquant
from fxquant.cli.main import main
from fxquant.errors import SchemeError
from fxquant.evaluation import Job, run
from fxquant.evaluation.job import check_job
from fxquant.evaluation.journal import read_journal
from fxquant.evaluation.results import read_results
from fxquant.evaluation.sweep import Sweep, run_sweep
from fxquant.evaluation.sweep_file import read_sweep
from fxquant.evaluation.sweep_tables import format_results, groups
from fxquant.ir.graph import Level, info
from fxquant.recipes import running
from fxquant.recipes.running import as_run, running_level
from tests.architectures import llama, token_ids
from tests.models import SMALL_OPT

SCHEMES = ("w8", "w8a8-static:p99")
SHORT: dict[str, Any] = {"windows": 2, "length": 32, "calibration_windows": 2}


def job(level: str = "auto", **changes: Any) -> Job:
    return Job(**{"model": str(SMALL_OPT), "schemes": SCHEMES, "level": level, **SHORT, **changes})


def sweep(path: Path, level: str = "auto") -> tuple[int, int]:
    """Cells computed now, and found there."""
    asked = Sweep((str(SMALL_OPT),), ("builtin",), (0,), job(level))
    outcome = run_sweep(asked, path, say=lambda _: None)
    assert not outcome.failed
    return outcome.now, outcome.before


def test_auto_is_the_devices() -> None:
    assert running_level("auto", "cpu") == running_level("auto", "meta") == "integer"
    assert (
        running_level("auto", "cuda:1") == running_level("auto", torch.device("cuda")) == "kernels"
    )
    assert running_level("qdq", "cuda") == "qdq"
    for wrong in ("float", "observed", "fast", ""):
        with pytest.raises(SchemeError, match="give auto, qdq, integer, kernels"):
            running_level(wrong, "cpu")
        with pytest.raises(SchemeError, match="no scheme is measured at level"):
            check_job(job(wrong))


def test_a_quantized_graph_is_fused_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fxquant.convert(llama(), "w8a8-dynamic")
    qdq, plain = fxquant.convert(llama(), "w8", level="qdq"), fxquant.trace(llama())
    assert all(as_run(each) is each for each in (graph, qdq, plain))
    monkeypatch.setattr(running, "device_of", lambda _: torch.device("cuda"))
    fast = as_run(graph)
    assert info(fast).level == Level.KERNELS
    assert info(graph).level == Level.INTEGER
    assert all(as_run(each) is each for each in (fast, qdq, plain))
    assert as_run(graph, "integer") is graph
    assert torch.equal(fast(token_ids(2, 9)), graph(token_ids(2, 9)))


def test_a_graph_goes_further_down_and_not_back() -> None:
    qdq = fxquant.convert(llama(), "w8a8-static", calibration=[token_ids(2, 9)], level="qdq")
    assert info(as_run(qdq, "kernels")).level == Level.KERNELS
    assert info(as_run(qdq, "integer")).level == Level.INTEGER
    with pytest.raises(SchemeError, match="no pass leads from level kernels back to level qdq"):
        as_run(as_run(qdq, "kernels"), "qdq")


def test_rows_and_provenance_say_the_level(tmp_path: Path) -> None:
    found = {}
    for level in ("auto", "integer", "kernels", "qdq"):
        outcome = run(job(level, output=tmp_path / level), say=lambda _: None)
        rows, made = read_results(tmp_path / level / "results.json")
        wanted = "integer" if level == "auto" else level
        assert made.level == wanted
        assert [row.level for row in rows] == ["float", wanted, wanted]
        assert f"on cpu at level {wanted} (" in (tmp_path / level / "table.md").read_text()
        found[level] = [row.window_nll for row in outcome.rows]
    assert found["auto"] == found["integer"] == found["kernels"]
    assert found["qdq"][1:] != found["integer"][1:]


def test_another_level_is_another_cell(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert sweep(path) == (3, 0)
    assert sweep(path, "integer") == (0, 3)
    assert sweep(path, "kernels") == (3, 0)
    results = read_journal(path)
    tables = format_results(results)
    assert tables.count("on cpu at level integer;") == 1
    assert tables.count("on cpu at level kernels;") == 1
    for group in groups(results, ()):
        assert [line.scheme for line in group.lines] == ["fp", *SCHEMES]
        assert all(line.difference is not None for line in group.lines)
    written = csv.DictReader(io.StringIO(format_results(results, "csv")))
    assert {row["level"] for row in written} == {"integer", "kernels"}


def test_results_that_do_not_say_their_level_go_on(tmp_path: Path) -> None:
    """As journals were before there was a choice: read, resumed, in one table with new ones."""
    path = tmp_path / "results.jsonl"
    sweep(path)
    lines = []
    for line in path.read_text().splitlines()[:2]:
        data = json.loads(line)
        assert data["figures"].pop("level") == ("float" if data["scheme"] == "fp" else "integer")
        assert data["provenance"].pop("level") == "integer"
        lines.append(json.dumps(data))
    path.write_text("".join(f"{line}\n" for line in lines))
    assert sweep(path) == (1, 2)
    (group,) = groups(read_journal(path), ())
    assert len(group.lines) == 3
    old = read_journal(path)[1]
    assert old.figures is not None
    assert old.provenance is not None
    assert (old.figures.level, old.provenance.level) == ("", "")
    assert " at level" not in old.provenance.line()


def test_a_row_of_no_level_is_refused(tmp_path: Path) -> None:
    run(job(output=tmp_path), say=lambda _: None)
    text = (tmp_path / "results.json").read_text()
    (tmp_path / "results.json").write_text(text.replace('"level": "float"', '"level": "fast"'))
    with pytest.raises(fxquant.errors.DataError, match=r"rows\[0\].level: 'fast' is no level"):
        read_results(tmp_path / "results.json")


def test_a_saved_graph_is_lowered_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = fxquant.convert(fxquant.load_model(str(SMALL_OPT)).model, "w8a8-dynamic-token")
    fxquant.save(graph, tmp_path / "saved", fxquant.load_model(str(SMALL_OPT)).tokenizer)
    losses = []
    for level in ("auto", "kernels"):
        outcome = run(job(level, model=str(tmp_path / "saved"), schemes=()), say=lambda _: None)
        assert outcome.rows[0].level == outcome.provenance.level
        losses.append(outcome.rows[0].window_nll)
    assert outcome.rows[0].level == "kernels"
    assert losses[0] == losses[1]
    command = ["evaluate", "--model", str(tmp_path / "saved"), "--level", "qdq", "--windows", "2"]
    assert main(command) == 2
    assert "no pass leads from level integer back to level qdq" in capsys.readouterr().err


def test_python_says_and_chooses_it() -> None:
    graph, ids = fxquant.convert(llama(), "w8a8-dynamic"), token_ids(2, 9)
    plain, fast = fxquant.evaluate(graph, ids), fxquant.evaluate(graph, ids, level="kernels")
    assert (plain.level, fast.level) == ("integer", "kernels")
    assert plain.sums == fast.sums
    assert "on cpu at level kernels (" in str(fast)
    assert fxquant.evaluate(llama(), ids, level="kernels").level == "float"
    with pytest.raises(SchemeError, match="no scheme is measured at level 'fast'"):
        fxquant.evaluate(graph, ids, level="fast")


def test_a_plan_is_verified_at_the_level(tmp_path: Path) -> None:
    command = ["plan", "--model", str(SMALL_OPT), "--windows", "2", "--length", "32"]
    command += ["--budget", "5", "--choices", "w8a8-dynamic-token", "fp", "--held-out-windows", "0"]
    found = []
    for level in ("integer", "kernels"):
        out = tmp_path / level
        assert main([*command, "--level", level, "--output", str(out)]) == 0
        plan = json.loads((out / "plan.json").read_text())
        assert plan["provenance"]["level"] == level
        found.append(plan["delta_loss"])
    assert found[0] == found[1]


def test_an_explanation_says_that_its_sites_are_simulated(tmp_path: Path) -> None:
    command = ["explain", "--model", str(SMALL_OPT), "--scheme", "w8a8-dynamic", "--length", "32"]
    command += ["--methods", "alone", "--worst", "0", "--output", str(tmp_path)]
    assert main(command) == 0
    assert json.loads((tmp_path / "explanation.json").read_text())["provenance"]["level"] == "qdq"


def test_a_sweeps_file_has_it(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text(f'models = ["{SMALL_OPT}"]\nschemes = ["w8"]\nlevel = "kernels"\n')
    assert read_sweep(file).job == replace(job("kernels"), schemes=("w8",), model=str(SMALL_OPT),
        windows=8, length=512, calibration_windows=16)  # fmt: skip
