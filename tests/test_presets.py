"""Presets: without the hub one error says what to fetch; with a local directory they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from fxquant.cli.main import main
from fxquant.evaluation import presets
from fxquant.evaluation.data import load_text
from fxquant.evaluation.journal import read_journal
from fxquant.evaluation.presets import PRESETS, notes
from fxquant.evaluation.published import GPTQ_TABLE, LENGTH, Published
from fxquant.evaluation.sweep import SweepOutcome
from fxquant.recipes.repairs import REPAIRS
from fxquant.schemes.scheme import Scheme
from tests.hub_format import write_c4, write_wikitext
from tests.models import small_opt

SHORT = ["--windows", "2", "--length", "48", "--calibration-windows", "2"]
SHORT += ["--calibration-length", "48"]


def missing_options(name: str) -> set[str]:
    """Options that the preset's schemes name and the repairs do not have."""
    named = [repair for text in PRESETS[name].schemes for repair in Scheme.parse(text).repairs]
    return {
        f"{repair}({option})"
        for repair, options in named
        for option in dict(options)
        if option not in REPAIRS[repair].option_names()
    }


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model directory and a folder of dataset clones, as the error tells one to make them."""
    root = tmp_path_factory.mktemp("preset")
    model, tokenizer = small_opt()
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    paragraphs = load_text("builtin").evaluation.split("\n\n")
    texts = [p for p in paragraphs if p]
    write_wikitext(root / "data", {"test": texts[:60], "train": texts[60:]})
    write_c4(root / "data", {"validation": texts[:60], "train": ["\n".join(texts[60:])]})
    return str(root / "model"), str(root / "data")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", PRESETS)
def test_without_the_hub_one_error_says_what_to_fetch(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", name, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("fxquant: error:") == 1
    for model in PRESETS[name].models:
        folder = model.split("/")[1]
        assert f"hf download {model} --local-dir {folder}" in error
        assert f"fxquant reproduce {name} --model {folder}" in error
    assert (
        "hf download --repo-type dataset Salesforce/wikitext --local-dir DATA/Salesforce/wikitext"
        in error
    )
    assert "--data DATA" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", PRESETS)
def test_a_local_directory_goes_on(
    name: str, local: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = local
    output = ["--output", str(tmp_path)]
    if missing_options(name):
        command = ["reproduce", name, "--model", model, "--data", data, *SHORT, *output]
        assert main(command) == 2
        assert "grid" in capsys.readouterr().err
        return
    assert main(["reproduce", name, "--model", model, "--data", data, *SHORT, *output]) == 0
    printed = capsys.readouterr().out
    assert PRESETS[name].title in printed
    for scheme in PRESETS[name].schemes:
        assert f"| {Scheme.parse(scheme)} " in printed
    # What keeps the figures from being comparable is said.
    assert "- length is 48, the preset's is 2048" in printed
    assert "is opt 4x128: nothing was published for it here" in printed
    assert "has no slow tokenizer, which the papers used" in printed
    again = ["reproduce", name, "--model", model, "--data", data, *SHORT, *output]
    assert main(again) == 0
    count = len({"fp", *PRESETS[name].schemes})
    assert f"{count} cells, {count} already in" in capsys.readouterr().out


def test_ours_stands_beside_the_published(
    local: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def figure(method: str, scheme: str | None, delta: float) -> Published:
        return Published("opt 4x128", None, method, scheme, "here", delta_loss=delta)

    table = (figure("Weights", "w8", 0.5), figure("Other", None, 0.7))
    ladder = PRESETS["opt-1.3b-ladder"]
    changed: Any = {"opt-1.3b-ladder": replace(ladder, published=table)}
    monkeypatch.setattr(presets, "PRESETS", changed)
    command = ["reproduce", "opt-1.3b-ladder", "--model", local[0], "--dataset", "builtin"]
    assert main([*command, *SHORT, "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    header = next(row for row in rows if "published" in row)

    def column(name: str, row: Sequence[str]) -> str:
        return row[header.index(name)]

    w8 = next(row for row in rows if row[0] == "w8")
    assert column("published as", w8) == "Weights"
    assert column("published", w8) == "Δ +0.5000"
    ours = float(column("Δloss ± s.e.", w8).split(" ")[0])
    assert float(column("ours less published", w8)) == pytest.approx(ours - 0.5, abs=1e-4)
    unmatched = next(row for row in rows if "Other" in row)
    assert column("loss", unmatched) == "-"
    assert "- the text is builtin, the preset's is wikitext2" in lines


def test_presets_keep_the_papers_protocol() -> None:
    for preset in PRESETS.values():
        sweep = preset.sweep({})
        assert sweep.job.length == LENGTH
        assert sweep.job.stride is None
        assert sweep.datasets == ("wikitext2",)
        assert sweep.job.windows == preset.windows
    assert PRESETS["gptq-table"].sweep({}).job.windows is None
    assert PRESETS["gptq-table"].sweep({"windows": 3}).job.windows == 3
    assert PRESETS["opt-1.3b-ladder"].sweep({"windows": None}).job.windows is None


def test_the_papers_rows_are_run_as_the_papers_do() -> None:
    """Not with our own defaults, which search scales and balance tokens."""
    found = {f.method: Scheme.parse(f.scheme) for f in GPTQ_TABLE if f.scheme is not None}
    for method, scheme in found.items():
        options = {name: dict(given) for name, given in scheme.repairs}
        if method.startswith("GPTQ"):
            assert options == {"gptq": {"within": "block", "grid": "minmax"}}
        elif method.startswith("AWQ"):
            assert options == {"awq": {"balanced": False}}
        else:
            assert options == {}


def test_shorter_windows_are_for_calibration_too() -> None:
    for preset in PRESETS.values():
        whole = preset.sweep({}).job
        for length, own in ((64, None), (whole.length, None), (64, 32), (4096, None)):
            job = preset.sweep({"length": length, "calibration_length": own}).job
            assert job.length == length
            assert job.calibration_length == (own or min(length, whole.calibration_length or 0))


def test_what_differs_from_the_papers_is_said() -> None:
    preset = PRESETS["gptq-table"]
    sweep = preset.sweep({"stream": True, "revision": "abc"})
    said = " ".join(notes(preset, sweep, SweepOutcome([], 0, 0, 0)))
    for words in ("min-max", "already updated", "sum of squares", "the Pile"):
        assert words in said
    assert "stream" not in said
    assert (sweep.job.stream, sweep.job.revision) == (True, "abc")


def test_reproduce_keeps_finished_blocks(
    local: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figure = Published("opt 4x128", None, "GPTQ", "w4-asym+gptq", "here", delta_loss=0.5)
    ladder = replace(PRESETS["opt-1.3b-ladder"], published=(figure,))
    monkeypatch.setattr(presets, "PRESETS", {"opt-1.3b-ladder": ladder})
    command = ["reproduce", "opt-1.3b-ladder", "--model", local[0], "--dataset", "builtin", *SHORT]
    blocks = tmp_path / "blocks"
    assert main([*command, "--cache", str(blocks), "--output", str(tmp_path / "out")]) == 0
    assert list(blocks.rglob("*.safetensors"))
    # It changes no figure: not a difference from the published ones.
    assert "cache" not in capsys.readouterr().out


def test_reproduce_streams(local: tuple[str, str], tmp_path: Path) -> None:
    """Weights stay in their files, figures stay the same."""
    command = ["reproduce", "opt-1.3b-ladder", "--model", local[0], "--dataset", "builtin", *SHORT]
    whole, streamed = tmp_path / "whole", tmp_path / "streamed"
    assert main([*command, "--output", str(whole)]) == 0
    assert main([*command, "--stream", "--output", str(streamed)]) == 0
    found = [read_journal(folder / "results.jsonl") for folder in (whole, streamed)]
    sums = [[(r.scheme, r.figures.sums) for r in results if r.figures] for results in found]
    assert len(sums[0]) == 5
    assert sums[0] == sums[1]
