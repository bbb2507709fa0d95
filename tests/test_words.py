"""The words at the tables: what a column counts, one spelling, names that stay whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import fxquant
from fxquant.analysis.inspection.folding import fold
from fxquant.analysis.inspection.summary import summarize
from fxquant.analysis.inspection.summary_text import render
from fxquant.cli.main import main
from fxquant.evaluation.models import load_model
from fxquant.evaluation.report.fields import Fields
from fxquant.evaluation.report.inspection import read_inspection
from fxquant.evaluation.report.ladder import _folded
from fxquant.evaluation.tables import LEGEND
from fxquant.ir.graph import info, update_info
from tests.architectures import token_ids
from tests.models import SMALL_OPT
from tests.test_explain import tiny
from tests.test_tracing import traced


def test_what_is_said_of_many_sites_is_one_line() -> None:
    entries = [(f"layers.{i}.fc1", "left in float") for i in range(30)]
    entries[7:7] = [("head", "other"), ("norm", "other"), ("tail", "last")]
    first, second, third = fold(entries)
    assert str(first) == "layers.0.fc1 … layers.29.fc1 (30 sites): left in float"
    assert str(second) == "head, norm: other"
    assert str(third) == "tail: last"


def test_what_is_said_of_each_block_by_its_number_is_one_line() -> None:
    entries = [
        (f"h.{i}.{name}", f"{name} is fed by h.{i}.{source}, not by h.99.c")
        for i in range(12)
        for name, source in (("fc2", "fc1"), ("out", "v"))
    ]
    folded = [str(each) for each in fold(entries)]
    assert folded == [
        "h.0.fc2 … h.11.fc2 (12 sites): fc2 is fed by h.*.fc1, not by h.99.c",
        "h.0.out … h.11.out (12 sites): out is fed by h.*.v, not by h.99.c",
    ]
    assert [str(each) for each in fold(entries[:2])] == [
        f"{site}: {text}" for site, text in entries[:2]
    ]


def test_an_override_of_many_sites_and_notes_alike_are_one_line_each() -> None:
    """In the printout, unless every site is asked for, and on the page."""
    _, graph = traced("opt")
    scheme = json.dumps({"scheme": "w8a8-dynamic+smooth", "overrides": {"*.fc?": "fp"}})
    converted = fxquant.convert(graph, scheme, calibration=[token_ids(2, 16)])
    notes = [note for site in info(converted).sites for note in [(site.path, "looked at")]]
    kept = tuple(replace(info(converted).notes[0], site=s, text=t) for s, t in notes)
    update_info(converted, notes=kept)
    text = fxquant.inspect(converted).summary()
    reason = "an override of the scheme leaves it in float"
    folded = f"- model.decoder.layers.0.fc1 … model.decoder.layers.1.fc2 (4 sites): {reason}"
    text = " ".join(text.split())
    assert folded in text
    assert text.count(reason) == 1
    assert text.count("looked at") == 1
    assert f"({len(notes)} sites): looked at" in text
    every = " ".join(fxquant.inspect(converted).summary(fold=False).split())
    assert every.count(reason) == 4
    assert every.count("looked at") == len(notes)
    data = json.loads(json.dumps(fxquant.inspect(converted).to_dict()))
    page = read_inspection(Fields(Path("inspect.json"), "", data))
    assert sum(reason in row for row in page.left_in_float.rows) == 1
    assert len(page.notes.rows) == 1
    lines = [f"model.layers.{i}.fc1: {reason}: why" for i in range(5)]
    assert _folded(lines) == (f"model.layers.0.fc1 … model.layers.4.fc1 (5 sites): {reason}: why",)


@pytest.mark.parametrize("rows", [512, 49152, 1512936])
def test_shapes_stay_whole(rows: int) -> None:
    """In the printout, however wide its other cells, and on the page."""
    _, graph = traced("llama")
    converted = fxquant.convert(
        graph, "w4-g16-asym/a8-static:p99.99", calibration=[token_ids(1, 20)]
    )
    summary = summarize(converted)
    wide = tuple(replace(row, site=replace(row.site, shape=(rows, 576))) for row in summary.sites)
    text = render(replace(summary, sites=wide))
    assert text.count(f"{rows}×576") == len(wide)
    assert max(map(len, text.splitlines())) <= 100
    data = json.loads(json.dumps(fxquant.inspect(converted).to_dict()))
    data["sites"][0]["site"]["shape"] = [rows, 576]
    table = read_inspection(Fields(Path("inspect.json"), "", data)).sites
    column = [column.key for column in table.columns].index("shape")
    assert table.rows[0][column] == f"{rows}×576"


@pytest.mark.parametrize("name", ["llama", "gemma2-eager"])
def test_dtypes_have_one_spelling(name: str) -> None:
    _, graph = traced(name)
    converted = fxquant.convert(graph, "w8a8-dynamic")
    found = fxquant.inspect(converted)
    text = f"{found.graph()}\n{found.summary()}\n{found.site(info(converted).sites[0].path)}"
    assert "fp32" in text
    for long in ("float32", "torch.", "float16"):
        assert long not in text, long


def test_a_model_goes_by_the_name_that_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package's weights lie in a cache, whose path says nothing."""
    cache = tmp_path / "cache"
    shutil.copytree(SMALL_OPT, cache)
    monkeypatch.setattr("fxquant.evaluation.models.package_model", lambda _: cache)
    command = ["inspect", "--model", "package:small-opt", "--scheme", "w8", "--format", "json"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["model"] == "package:small-opt"
    assert str(cache) not in printed
    for streamed in (False, True):
        graph = load_model("package:small-opt", streamed=streamed).graph
        assert info(graph).model == "package:small-opt"
        assert str(cache) not in info(graph).config


def test_each_table_says_what_it_counts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    short = ["--windows", "1", "--length", "32", "--calibration-windows", "1"]
    out = tmp_path / "out"
    command = ["evaluate", "--model", str(SMALL_OPT), "--schemes", "w8a8-static", *short]
    assert main([*command, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    for text in (printed, (out / "table.md").read_text()):
        assert text.count(LEGEND) == 1
    assert "bits/weight" in printed
    assert main(["report", str(out)]) == 0
    assert LEGEND.partition("'")[0] in (out / "report.html").read_text()
    # Three counts, two of one meaning: the explanation's is that of a site, on what was measured.
    text = str(tiny("opt", "w8a8-static:p99"))
    assert "| clipped   | rounded to zero   |" in text
    assert "clipped, rounded to zero: shares of the elements of the site's input on these" in text
    assert "to zero 1" not in text
    graph = fxquant.convert(traced("opt")[1], "w8a8-static", calibration=[token_ids(1, 20)])
    inspected = str(fxquant.inspect(graph))
    assert "outside: share of the calibration's elements outside" in inspected
    assert "clipped" not in inspected
    assert "stored in the blocks' linears: codes, scales and zero points" in inspected


def test_a_plain_trace_says_what_the_weights_were(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "dequantized from GGUF: 100.00% Q4_1"
    monkeypatch.setattr("fxquant.evaluation.models._weights", lambda *_: words)
    loaded = load_model(str(SMALL_OPT))
    assert info(fxquant.trace(loaded.model)).weights == loaded.weights == words
