"""Sweeps: what they compute, that nothing is lost or done twice, whatever stops them."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

import fxquant
from fxquant.cli.main import main
from fxquant.errors import DataError, FxquantError, ModelError, SchemeError, TracingError
from fxquant.evaluation import Job, converter, models, run
from fxquant.evaluation import sweep as sweep_module
from fxquant.evaluation.fingerprint import Identity, fingerprint
from fxquant.evaluation.job import check_job, open_sources
from fxquant.evaluation.journal import Journal, Result, read_journal
from fxquant.evaluation.results import Row
from fxquant.evaluation.sweep import Sweep, SweepOutcome, run_sweep
from fxquant.evaluation.sweep_file import read_sweep
from fxquant.evaluation.sweep_tables import format_results, groups
from fxquant.passes import Gptq
from fxquant.schemes.scheme import Scheme
from tests.hub_format import write_c4
from tests.kills import killed
from tests.models import SMALL_OPT, small_opt

SCHEMES = ("w8", "w8a8-dynamic", "w8a8-static:p99")


def sweep(**changes: Any) -> Sweep:
    options: dict[str, Any] = {
        "schemes": SCHEMES,
        "windows": 3,
        "length": 48,
        "calibration_windows": 2,
        **changes,
    }
    return Sweep((str(SMALL_OPT),), ("builtin",), (0, 1), Job(model="", **options))


def quiet(_: str) -> None:
    pass


def swept(what: Sweep, path: Path, **options: Any) -> SweepOutcome:
    return run_sweep(what, path, say=quiet, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepOutcome, float]:
    path = tmp_path_factory.mktemp("sweep") / "results.jsonl"
    started = time.perf_counter()
    outcome = swept(sweep(), path)
    return path, outcome, time.perf_counter() - started


Undisturbed = tuple[Path, SweepOutcome, float]


def figures(result: Result) -> Row:
    """A result's row without its times."""
    assert result.figures is not None, result.error
    return replace(result.figures, convert_seconds=0, evaluate_seconds=0)


def test_cells_are_those_of_evaluate(undisturbed: Undisturbed) -> None:
    _, outcome, _ = undisturbed
    cells = [(r.scheme, r.seed) for r in outcome.results]
    # What no calibration window can change is computed once.
    assert cells == [
        ("fp", None),
        ("w8", None),
        ("w8a8-dynamic", None),
        ("w8a8-static:p99", 0),
        ("w8a8-static:p99", 1),
    ]
    for seed, chosen in ((0, outcome.results[:4]), (1, [outcome.results[4]])):
        alone = run(replace(sweep().job, model=str(SMALL_OPT), seed=seed)).rows
        by_scheme = {row.scheme: row for row in alone}
        for result in chosen:
            row = replace(by_scheme[result.scheme], convert_seconds=0, evaluate_seconds=0)
            assert figures(result) == row
    assert outcome.results[3].figures != outcome.results[4].figures


def test_lines_describe_themselves(undisturbed: Undisturbed) -> None:
    path, _, _ = undisturbed
    for text in path.read_text().splitlines():
        line = json.loads(text)
        assert line["fingerprint"].startswith("sha256:")
        assert line["model"] == line["provenance"]["model"] == str(SMALL_OPT)
        assert line["protocol"] == line["provenance"]["protocol"]
        assert line["protocol"]["windows"] == len(line["figures"]["window_nll"]) == 3
        assert line["figures"]["window_tokens"] == [47, 47, 47]
        total = math.fsum(line["figures"]["window_nll"])
        assert line["figures"]["loss"] == total / (3 * 47)
        assert line["error"] is None
    assert [r.to_line() for r in read_journal(path)] == path.read_text().splitlines()


def test_again_does_nothing(undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch) -> None:
    path, outcome, _ = undisturbed
    before = path.read_bytes()

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fxquant.evaluation.job.load_model", forbidden)
    again = swept(sweep(), path)
    assert (again.before, again.now, again.results) == (5, 0, outcome.results)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [{"length": 40}, {"windows": 2}, {"stride": 24}, {"batch_size": 2}, {"dtype": "float16"}],
)
def test_another_setting_is_another_result(
    undisturbed: Undisturbed, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path, _, _ = undisturbed
    copy = tmp_path / "results.jsonl"
    copy.write_bytes(path.read_bytes())
    other = swept(sweep(schemes=(), **changes), copy)
    assert (other.before, other.now, other.failed) == (0, 1, 0)
    assert len(read_journal(copy)) == 6


def test_calibration_matters_to_static_schemes_only(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    path, _, _ = undisturbed
    copy = tmp_path / "results.jsonl"
    copy.write_bytes(path.read_bytes())
    other = swept(sweep(calibration_windows=3), copy)
    assert (other.before, other.now) == (3, 2)
    # What calibration does not touch is compared with either calibration's results.
    tables = groups(read_journal(copy))
    assert [group.provenance.calibration_windows for group in tables] == [2, 3]
    for group in tables:
        assert [line.scheme for line in group.lines] == ["fp", *SCHEMES]
        for line, scheme in zip(group.lines, ("fp", *SCHEMES), strict=True):
            assert line.difference is not None, scheme
    again = {line.scheme: line for line in groups(other.results)[0].lines}["w8a8-static:p99"]
    last = figures(other.results[-1]).loss
    assert again.loss == pytest.approx((figures(other.results[-2]).loss + last) / 2)
    assert again.difference is not None
    assert again.loss is not None
    fp = figures(other.results[0]).loss
    assert again.difference.delta == pytest.approx(again.loss - fp)
    assert "| w8a8-static:p99 | - " not in format_results(read_journal(copy))


def test_what_is_not_calibrated_shows_alone(undisturbed: Undisturbed) -> None:
    results = [r for r in undisturbed[1].results if r.seed is None]
    (group,) = groups(results)
    assert [line.scheme for line in group.lines] == ["fp", "w8", "w8a8-dynamic"]
    assert group.provenance.calibration == "nothing"


def copied(tmp_path: Path, without: str = "") -> Path:
    """The model's files, but those whose name ends with ``without``."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in SMALL_OPT.iterdir():
        if not without or not file.name.endswith(without):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def other_activation(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "activation_function": "gelu"}))


def flipped_bit(folder: Path) -> None:
    """The last bit of the first weight's mantissa; the file's length stays."""
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def other_tokenizer(folder: Path) -> None:
    """The same vocabulary, the text in small letters."""
    data = json.loads((folder / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(data))


@pytest.mark.parametrize("change", [other_activation, flipped_bit, other_tokenizer])
def test_a_changed_file_is_another_model(tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder = copied(tmp_path)
    once = replace(sweep(schemes=()), models=(str(folder),))
    path = tmp_path / "results.jsonl"
    first = swept(once, path)
    assert (first.now, first.failed) == (1, 0)
    assert swept(once, path).now == 0
    change(folder)
    second = swept(once, path)
    assert (second.now, second.failed) == (1, 0)


# --- failures -------------------------------------------------------------------------------------


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = converter.measure, []

    def measure(converts: Any, scheme: Any, *rest: Any) -> Row:
        calls.append(str(scheme))
        if str(scheme) == "w8":
            raise RuntimeError("out of memory\nwith details")
        return original(converts, scheme, *rest)

    monkeypatch.setattr(sweep_module, "measure", measure)
    path = tmp_path / "results.jsonl"
    first = swept(sweep(), path)
    assert first.failed == 1
    assert [r.error for r in first.results if r.error] == [
        "RuntimeError: out of memory with details"
    ]
    assert "failed: " in format_results(first.results)
    calls.clear()
    assert swept(sweep(), path).failed == 1
    assert calls == []
    monkeypatch.setattr(sweep_module, "measure", original)
    again = swept(sweep(), path, retry_failed=True)
    assert (again.now, again.failed) == (1, 0)
    assert "failed" not in format_results(read_journal(path))


def test_missing_models_and_texts_fail_alone_and_are_tried_again(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words " * 100)
    here, model = str(SMALL_OPT), str(tmp_path / "model")
    both = replace(sweep(schemes=()), models=(model, here), datasets=("builtin", str(text)))
    both = replace(both, job=replace(both.job, windows=100))
    path = tmp_path / "results.jsonl"
    first = swept(both, path)
    errors = [result.error or "" for result in first.results]
    assert ["no model directory" in error for error in errors] == [True, True, False, False]
    assert "too short" in errors[3]
    assert errors[2] == ""
    (tmp_path / "model").symlink_to(SMALL_OPT)
    second = swept(both, path)
    assert (second.before, second.now, second.failed) == (2, 2, 2)
    table = format_results(read_journal(path))
    assert "no model directory" not in table.split("failed:")[0]


@pytest.mark.parametrize("named_by", ["files", "commit"])
def test_weights_that_come_later_are_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named_by: str
) -> None:
    """The configuration is found, the weights are not: nothing of that is final."""
    folder = copied(tmp_path, without=".safetensors")
    if named_by == "commit":  # as a model of the hub: its name does not change with its files
        known = Identity(str(folder), "0123abc", "opt 4x128")
        monkeypatch.setattr(sweep_module, "identify_model", lambda *_: known)
    both = replace(sweep(schemes=("w8",)), models=(str(folder),))
    path = tmp_path / "results.jsonl"
    for _ in range(2):
        outcome = swept(both, path)
        assert (outcome.before, outcome.now, outcome.failed) == (0, 2, 2)
        assert all("cannot load" in str(result.error) for result in outcome.results)
        assert len(path.read_text().splitlines()) == 2
    (folder / "model.safetensors").write_bytes((SMALL_OPT / "model.safetensors").read_bytes())
    outcome = swept(both, path)
    assert (outcome.before, outcome.now, outcome.failed) == (0, 2, 0)
    assert "failed" not in format_results(read_journal(path))
    assert swept(both, path).now == 0


def test_a_model_that_cannot_be_traced_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untraceable(_: Any) -> None:
        raise TracingError("routes by data")

    monkeypatch.setattr(models, "trace", untraceable)
    path = tmp_path / "results.jsonl"
    first = swept(sweep(schemes=()), path)
    assert [result.error for result in first.results] == ["routes by data"]
    assert swept(sweep(schemes=()), path).now == 0


def test_what_is_misspelled_stops_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "identify_model", lambda *_: pytest.fail("work was started"))
    path = tmp_path / "results.jsonl"
    for wrong in (
        sweep(schemes=("w8x",)),
        sweep(stride=100),
        sweep(dtype="int8"),
        replace(sweep(), datasets=("c4",)),
    ):
        with pytest.raises(FxquantError):
            swept(wrong, path)
    assert not path.exists()


def test_a_sweep_streams_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both reach the loader; conversions get a folder for their leaves, as in evaluate."""
    file = tmp_path / "s.toml"
    file.write_text(
        f'models = ["{SMALL_OPT}"]\nschemes = ["w8"]\nstream = true\nrevision = "v1"\n'
        "windows = 2\nlength = 48\ncalibration_windows = 0\n"
    )
    asked, workspaces = [], []
    load, convert = models.load_model, converter.Converter.convert

    def load_model(name: str, **options: Any) -> Any:
        asked.append((options["streamed"], options["revision"]))
        return load(name, **{**options, "revision": None})  # a folder has none

    def converted(self: converter.Converter, scheme: Any) -> Any:
        workspaces.append(self.graph.meta.get("fxquant_workspace"))
        return convert(self, scheme)

    monkeypatch.setattr("fxquant.evaluation.job.load_model", load_model)
    monkeypatch.setattr(converter.Converter, "convert", converted)
    outcome = swept(read_sweep(file), tmp_path / "results.jsonl")
    assert outcome.failed == 0
    assert asked == [(True, "v1")]
    assert len(workspaces) == 2
    assert None not in workspaces


def test_a_replaced_calibration_shard_is_another_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C4's train split, of which single documents are drawn, is not part of the text's hash."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    asked = Job(model="", schemes=(), dataset="builtin", calibration_dataset="c4-new")
    model = Identity("x", "y", "z")

    def found(folder: str, train: list[str], scheme: str) -> str:
        write_c4(tmp_path / folder, {"validation": ["evaluated"], "train": train})
        sources = open_sources(replace(asked, data=tmp_path / folder))
        return fingerprint(asked, Scheme.parse(scheme), model, *sources)

    texts = ["one text", "another", "a third"]
    for scheme, calibrated in (("w8a8-static", True), ("w4+gptq", True), ("w8", False)):
        first = found(f"{scheme} 1", texts, scheme)
        assert found(f"{scheme} 2", texts, scheme) == first
        for number, other in enumerate((texts[:2], [*texts[1:], texts[0]], ["one textanother"])):
            again = found(f"{scheme} other {number}", other, scheme)
            assert (again != first) == calibrated


@pytest.mark.parametrize("key", ["cache", ""])
def test_finished_blocks_are_kept_where_the_file_says(tmp_path: Path, key: str) -> None:
    """They change no figure, so whether they are kept does not tell one result from another."""
    file, blocks = tmp_path / "s.toml", tmp_path / "blocks"
    said = f'models = ["{SMALL_OPT}"]\nschemes = ["w4+gptq"]\n'
    said += "windows = 2\nlength = 48\ncalibration_windows = 1\n"
    file.write_text(said + (f'{key} = "{blocks}"\n' if key else ""))
    path = tmp_path / "results.jsonl"
    asked = read_sweep(file)
    first = swept(asked, path)
    assert (first.now, first.failed) == (2, 0)
    assert bool(list(blocks.rglob("*.safetensors"))) == bool(key)
    other = replace(asked, job=replace(asked.job, cache=None if key else blocks))
    assert swept(other, path).now == 0
    assert len(groups(first.results)) == 1


def test_blocks_of_the_cache_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(sweep(schemes=("w4+gptq",), cache=tmp_path / "blocks"), seeds=(0,))
    first = swept(asked, tmp_path / "one.jsonl")
    monkeypatch.setattr(Gptq, "solve", lambda *_: pytest.fail("a finished block was done again"))
    second = swept(asked, tmp_path / "two.jsonl")
    assert second.failed == 0
    assert [figures(r) for r in second.results] == [figures(r) for r in first.results]


def test_a_cache_that_nothing_uses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="no scheme here has a repair that keeps"):
        swept(sweep(cache=tmp_path / "blocks"), tmp_path / "results.jsonl")


def test_the_revision_identifies_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def identify(name: str, revision: str | None = None) -> Any:
        asked.append((name, revision))
        raise DataError("not here")

    monkeypatch.setattr(sweep_module, "identify_model", identify)
    swept(sweep(schemes=(), revision="v1"), tmp_path / "results.jsonl")
    assert asked == [(str(SMALL_OPT), "v1")]


def test_many_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.toml"
    file.write_text(TOML)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for command in (["sweep", str(file)], ["reproduce", "opt-1.3b-ladder", "--model", "x"]):
        assert main([*command, "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "torchrun started 3" in error
        assert "torchrun --nproc-per-node 3 -m fxquant.evaluation" in error
    assert not (tmp_path / "out").exists()


def test_a_saved_graph_is_refused_before_any_work(tmp_path: Path) -> None:
    graph = fxquant.convert(fxquant.trace(small_opt()[0]), "w8")
    fxquant.save(graph, tmp_path / "saved")
    with pytest.raises(ModelError, match="saved: the graph is quantized already"):
        swept(replace(sweep(), models=(str(tmp_path / "saved"),)), tmp_path / "results.jsonl")
    assert not (tmp_path / "results.jsonl").exists()


# --- the journal ----------------------------------------------------------------------------------


def test_a_line_torn_anywhere_is_no_line(undisturbed: Undisturbed, tmp_path: Path) -> None:
    lines = undisturbed[0].read_bytes().splitlines(keepends=True)[:2]
    whole = b"".join(lines)
    path = tmp_path / "results.jsonl"
    for end in {*range(len(lines[0]), len(whole), 97), len(whole) - 1, len(lines[0]) + 1}:
        path.write_bytes(whole[:end])
        (only,) = read_journal(path)
        with Journal(path) as journal:
            assert list(journal.results.values()) == [only]
            journal.append(Result.from_line(lines[1].decode()))
        assert path.read_bytes() == whole


@pytest.mark.parametrize("wrong", ['{"format": 1}', "[]", "{", '{"format": 2}', "\xff", "7"])
def test_damage_inside_names_the_line(undisturbed: Undisturbed, tmp_path: Path, wrong: str) -> None:
    lines = undisturbed[0].read_text().splitlines()
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join([lines[0], wrong, lines[1], ""]), encoding="latin-1")
    with pytest.raises(DataError, match=r"results.jsonl, line 2 is no result of this version"):
        read_journal(path)
    with pytest.raises(DataError, match="line 2"), Journal(path):
        pass


def test_two_writers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with Journal(path), pytest.raises(DataError, match="another process is writing"):
        Journal(path).__enter__()
    with Journal(path):
        pass


def test_unwritable_results(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write results"):
        swept(sweep(), tmp_path / "file" / "results.jsonl")


# --- kills ----------------------------------------------------------------------------------------


def same_table_after_kills(undisturbed: Undisturbed, path: Path, kills: int, seed: int) -> None:
    _, expected, seconds = undisturbed
    draw, hit = random.Random(seed), 0
    for _ in range(10 * kills):
        if hit == kills:
            break
        if killed(lambda: swept(sweep(), path), draw.uniform(0, seconds)):
            hit += 1
        else:
            path.unlink()  # it was finished: begin again, so that every kill hits a run
    assert hit == kills
    last = swept(sweep(), path)
    assert last.before + last.now == len(expected.results)
    assert format_results(read_journal(path)) == format_results(expected.results)
    assert [figures(r) for r in last.results] == [figures(r) for r in expected.results]
    fingerprints = [json.loads(line)["fingerprint"] for line in path.read_text().splitlines()]
    assert len(set(fingerprints)) == len(fingerprints)


def test_killed_at_random_it_ends_with_the_same_table(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    same_table_after_kills(undisturbed, tmp_path / "results.jsonl", kills=4, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_twenty_times(undisturbed: Undisturbed, tmp_path: Path, seed: int) -> None:
    same_table_after_kills(undisturbed, tmp_path / "results.jsonl", kills=20, seed=seed)


# --- the file and the command ---------------------------------------------------------------------

TOML = f"""
models = ["{SMALL_OPT}"]
schemes = ["w8", "w8a8-static:p99"]
seeds = [0, 1]
windows = 2
length = 48
calibration_windows = 2
"""


def test_sweep_file_and_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = tmp_path / "mine.toml", tmp_path / "out"
    file.write_text(TOML)
    assert read_sweep(file).datasets == ("builtin",)
    assert main(["sweep", str(file), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "4 cells, 0 already" in printed
    assert "sd over seeds" in printed
    (first, *_) = read_journal(output / "results.jsonl")
    assert first.provenance is not None
    assert first.provenance.command == f"fxquant sweep {file} --output {output}"
    assert main(["table", str(output / "results.jsonl"), "--format", "latex"]) == 0
    assert r"\begin{tabular}" in capsys.readouterr().out


def test_the_example_of_the_docs_is_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where its cache is made
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    (block,) = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "opt.toml").write_text(block)
    found = read_sweep(tmp_path / "opt.toml")
    assert (found.job.windows, found.job.cache) == (None, Path("blocks"))
    assert [len(check_job(job)) for job in found.jobs()] == [4] * 12


def test_a_table_says_which_tokenizer_had_to_do(
    undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = undisturbed[0].read_text().replace('"dataset": "builtin"', '"dataset": "wikitext2"')
    path = tmp_path / "results.jsonl"
    path.write_text(lines)
    note = f"{SMALL_OPT} has no slow tokenizer, which the papers used"
    assert main(["table", str(path)]) == 0
    assert capsys.readouterr().out.count(note) == 1
    assert main(["table", str(path), "--format", "csv"]) == 0
    printed = capsys.readouterr().out
    assert note not in printed
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert [row["scheme"] for row in rows] == ["fp", *SCHEMES]
    assert not any(None in row for row in rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models = [", "cannot read sweep"),
        ('modles = ["x"]', "unknown key modles; known: models"),
        ('schemes = ["w8"]', "models must be a list of at least one of strings"),
        ('models = ["x"]\nschemes = ["w8"]\nseeds = [true]', "seeds must be .* integers"),
        ('models = ["x"]\nschemes = ["w8"]\nwindows = "some"', 'an integer or "all"'),
        ('models = ["x"]\nschemes = ["w8"]\ndevice = 1', "device must be a string, got 1"),
        ('models = ["x"]\nschemes = ["w8"]\nstream = 1', "stream must be true or false, got 1"),
        ('models = ["x"]\nschemes = ["w8"]\ncache = 1', "cache must be a string, got 1"),
    ],
)
def test_bad_sweep_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_sweep(file)
