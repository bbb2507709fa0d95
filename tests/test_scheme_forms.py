"""Schemes as data: their JSON form as a dict or a file, what is none, and what plan writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fxquant
from fxquant.cli.main import main
from fxquant.errors import ArgumentError, SchemeError
from fxquant.ir.graph import info
from fxquant.schemes.scheme import Scheme, brief
from tests.models import SMALL_OPT, small_opt

ROOT = Path(__file__).parent.parent
MODEL, TOKENIZER = small_opt()
GRAPH = fxquant.trace(MODEL)

OVERRIDES = {"scheme": "w8a8-dynamic", "overrides": {"*.fc2": "fp", "*.0.*": "w4", "*.fc1": "w8"}}


def test_a_scheme_is_its_json_form_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(OVERRIDES))
    expected = Scheme.from_json(json.dumps(OVERRIDES))
    for form in (OVERRIDES, json.dumps(OVERRIDES), path, str(path), expected):
        assert info(fxquant.convert(GRAPH, form)).scheme == str(expected)
    assert fxquant.recipe(path) == fxquant.recipe(expected)


BAD_SCHEMES: dict[str, tuple[Any, str]] = {
    "none": (None, "a scheme is text such as 'w8a8-static', a fxquant.Scheme or .* not a NoneType"),
    "a list": (["w8", "w4"], "not a list: convert once for each"),
    "a list of one": (["w8"], "not a list$"),
    "a tuple": (("w8", "w4"), "not a tuple: convert once for each"),
    "batches": ([torch.ones(1, 4)], "not a list"),
    "a number": (8, "not a int"),
    "a tokenizer": (TOKENIZER, f"not a {type(TOKENIZER).__name__}"),
    "a spec": (Scheme.parse("w8").spec, "not a SiteSpec"),
    "an empty dict": ({}, r"scheme JSON not understood \(no key 'scheme'\)"),
    "another dict": ({"w8": True}, "scheme JSON not understood"),
    "a key too many": ({"scheme": "w8", "bits": 4}, r"unknown keys \['bits'\]"),
    "a dict of objects": ({"scheme": Scheme()}, "scheme JSON not understood .TypeError"),
    "a dict of numbers": ({"scheme": 8}, "a scheme inside JSON is text"),
    "no file": ("no/such/plan.json", r"scheme: cannot read no/such/plan\.json"),
    "a folder": (Path("docs"), "scheme: cannot read docs"),
    "another file": (Path("README.md"), r"README\.md: scheme JSON not understood"),
    "a file of bytes": (SMALL_OPT / "model.safetensors", "scheme: cannot read"),
}


@pytest.mark.parametrize("what", BAD_SCHEMES)
def test_a_scheme_that_is_none(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(model: object) -> Any:
        raise AssertionError("traced before the scheme was checked")

    monkeypatch.setattr("fxquant.recipes.conversion.trace", work)
    monkeypatch.chdir(ROOT)
    scheme, message = BAD_SCHEMES[what]
    for door in (fxquant.convert, fxquant.explain):
        with pytest.raises(SchemeError, match=message):
            door(MODEL, scheme)


def test_other_doors_to_schemes() -> None:
    for given in (None, {"scheme": "w8"}, ["w8"]):
        with pytest.raises(SchemeError, match="a scheme is text such as"):
            Scheme.parse(given)  # type: ignore[arg-type]
    windows = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ArgumentError, match="choices must be a list of text or none, got 'w8'"):
        fxquant.plan(MODEL, data=windows, budget=1, choices="w8")
    with pytest.raises(ArgumentError, match="choices must be a list of text or none, got"):
        fxquant.plan(MODEL, data=windows, budget=1, choices=["w8", None])  # type: ignore[list-item]


def test_a_plan_is_written_and_taken_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--model", str(SMALL_OPT), "--length", "32", "--calibration-windows", "1"]
    plan = tmp_path / "plan"
    choices = ["--choices", "w2", "w4", "w8", "fp", "--windows", "1"]
    assert main(["plan", *short, *choices, "--budget", "0.02", "--output", str(plan)]) == 0
    scheme = str(plan / "scheme.json")
    planned = Scheme.from_json((plan / "scheme.json").read_text())
    assert len(planned.overrides) > 2
    capsys.readouterr()
    results = tmp_path / "results"
    options = ["--windows", "1", "--schemes", scheme, "w8", "--output", str(results)]
    assert main(["evaluate", *short, *options]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((results / "results.json").read_text())["rows"]
    assert [row["scheme"] for row in rows] == ["fp", str(planned), "w8"]
    assert rows[1]["delta_loss"] <= 0.02
    assert f"{len(planned.overrides)} overrides (sha256:" in printed
    assert max(map(len, printed.splitlines()[:6])) < 200  # the overrides are not listed
    for command in ("convert", "inspect"):
        output = ["--output", str(tmp_path / "saved")] if command == "convert" else []
        assert main([command, *short, "--scheme", scheme, *output]) == 0
    assert info(fxquant.load(tmp_path / "saved")).scheme == str(planned)
    assert main(["evaluate", *short, "--schemes", str(tmp_path / "none.json")]) == 2
    assert "scheme: cannot read" in capsys.readouterr().err


def test_a_sweep_takes_files_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cell is known by what the file says, not by its name."""
    path, sweep = tmp_path / "mine.json", tmp_path / "sweep.toml"
    path.write_text(json.dumps(OVERRIDES))
    sweep.write_text(
        f'models = ["{SMALL_OPT}"]\nschemes = ["{path}"]\nwindows = 1\nlength = 16\n'
        "calibration_windows = 0\n"
    )
    command = ["sweep", str(sweep), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    found = [json.loads(line)["scheme"] for line in lines if "scheme" in json.loads(line)]
    assert found == ["fp", str(Scheme.from_json(json.dumps(OVERRIDES)))]
    assert "3 overrides (sha256:" in capsys.readouterr().out
    path.write_text(json.dumps({**OVERRIDES, "scheme": "w8"}))
    assert main(command) == 0
    assert "2 cells, 1 already in" in capsys.readouterr().out


def test_brief_names_of_schemes() -> None:
    assert brief("w8a8-static+smooth") == "w8a8-static+smooth"
    one = '{"scheme": "w8", "overrides": {"head": "w8"}}'
    assert brief(one) == one
    long = str(Scheme.from_json(json.dumps(OVERRIDES)))
    assert brief(long).startswith("w8a8-dynamic, 3 overrides (sha256:")
    other = long.replace('"w4"', '"w3"')
    assert brief(other) != brief(long)
