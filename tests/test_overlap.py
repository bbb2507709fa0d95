"""Calibration and evaluation share no token, in one command and across two, or it is refused."""

from __future__ import annotations

import functools
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

import fxquant
from fxquant.cli.main import main
from fxquant.errors import DataError
from fxquant.evaluation.builtin_text import builtin_text
from fxquant.evaluation.data import cut_windows
from fxquant.evaluation.overlap import calibrated_windows
from fxquant.evaluation.protocol import Recipe
from fxquant.evaluation.source import Source, tokens
from fxquant.evaluation.token_windows import Windows
from fxquant.ir.calibrated_rows import seen_rows
from fxquant.ir.calibration import CalibrationRecord
from fxquant.ir.graph import info
from fxquant.ir.token_runs import FEWEST, SURE, KnownRuns, run_needed, written_runs
from fxquant.pipeline.recording import record_of
from tests.models import SMALL_OPT, small_opt

TOKENIZER = small_opt()[1]


def prose(seed: int, words: int) -> str:
    """Random words: no run of more than a few tokens occurs twice."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(draw.choices(letters, k=draw.randint(2, 7))) for _ in range(words))


def prose_file(folders: pytest.TempPathFactory, seed: int, words: int) -> Path:
    file = folders.mktemp("text") / "some.txt"
    file.write_text(prose(seed, words))
    return file


@functools.cache
def graph() -> GraphModule:
    return fxquant.trace(small_opt()[0])


@functools.cache
def ids_of(text: str) -> tuple[int, ...]:
    return tuple(tokens(text, TOKENIZER).tolist())


def places(rows: Tensor, text: str) -> list[set[int]]:
    """The positions of each row's tokens in the text, found by what they are."""
    stream = ids_of(text)
    found = []
    for row in map(tuple, rows.tolist()):
        (start,) = [at for at in range(len(stream)) if stream[at : at + len(row)] == row]
        found.append(set(range(start, start + len(row))))
    return found


def read(windows: Windows) -> tuple[CalibrationRecord, ...]:
    return () if windows.batches is None else (record_of(windows.batches, graph(), "calibrate"),)


SETTINGS = st.fixed_dictionaries(
    {
        "count": st.integers(1, 9),
        "length": st.integers(12, 48),
        "stride": st.one_of(st.none(), st.integers(3, 12)),
        "calibration": st.integers(0, 8),
        "calibration_length": st.one_of(st.none(), st.integers(12, 40)),
        "seed": st.integers(0, 9),
    }
)
SAMPLERS = st.sampled_from(["grid", "offsets"])


def check_two_commands(
    number: int, sampler: Any, first: dict[str, Any], second: dict[str, Any]
) -> None:
    """One command calibrates and keeps windows apart, another evaluates: by position, exactly."""
    text = prose(number, 500)
    source = Source("one", (text,), None, Recipe(sampler=sampler))
    done = cut_windows(source, TOKENIZER, **first)
    calibrated = set().union(*places(done.calibration, text))
    assert not calibrated & set().union(*places(done.evaluation, text))
    assert calibrated_windows(read(done), done) == ()
    renamed = Source("copy", (text,), None)
    asked = cut_windows(renamed, TOKENIZER, **{**second, "calibration": 0})
    shared = [bool(place & calibrated) for place in places(asked.evaluation, text)]
    expected = tuple(index for index, each in enumerate(shared) if each)
    assert calibrated_windows(read(done), asked) == expected


@pytest.mark.parametrize(
    ("texts", "examples"), [(4, 30), pytest.param(21, 600, marks=pytest.mark.slow)]
)
def test_two_commands_share_no_token_unseen(texts: int, examples: int) -> None:
    drawn = given(st.integers(0, texts - 1), SAMPLERS, SETTINGS, SETTINGS)
    settings(max_examples=examples, deadline=None)(drawn(check_two_commands))()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(0, 3))
def test_documents_that_are_evaluated_too(seed: int, shared: int) -> None:
    """Single documents are drawn: what the evaluated stream holds nearly whole is refused."""
    texts = [prose(100 + n, 60) for n in range(6)]
    others = [prose(200 + n, 60) for n in range(4 - shared)]
    recipe = Recipe(sampler="documents", join="\n\n")
    source = Source("mixed", texts, [*texts[:shared], *others], recipe)
    cut: dict[str, Any] = {"count": 5, "length": 48, "calibration": 5, "seed": seed}
    windows = cut_windows(source, TOKENIZER, **cut, allow_overlap=True)
    nearly = any(
        len(set(triples(row)) & set(triples(other))) > 0.9 * len(triples(other))
        for row in windows.calibration.tolist()
        for other in windows.evaluation.tolist()
    )
    if nearly:
        with pytest.raises(DataError, match=r"holds? the text to calibrate on, mixed"):
            cut_windows(source, TOKENIZER, **cut)
    if not shared:
        assert torch.equal(cut_windows(source, TOKENIZER, **cut).calibration, windows.calibration)


def triples(row: list[int]) -> list[tuple[int, ...]]:
    return list(zip(row, row[1:], row[2:], strict=False))


@pytest.mark.parametrize("change", ["in front {}", "{} behind", "in front\n{}\nbehind"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_copy_in_another_text_is_known(change: str, seed: int) -> None:
    text = prose(seed, 500)
    cut: dict[str, Any] = {"length": 48, "seed": seed}
    done = cut_windows(Source("a", (text,), None), TOKENIZER, count=2, calibration=6, **cut)
    copy = change.format(text)
    asked = cut_windows(Source("b", (copy,), None), TOKENIZER, count=None, calibration=0, **cut)
    found = calibrated_windows(read(done), asked)
    rows = places(done.calibration, copy)
    windows = places(asked.evaluation, copy)
    shares = [max(len(place & row) / len(place) for row in rows) for place in windows]
    assert found
    assert all(shares[index] > 0.5 for index in found)
    for index, share in enumerate(shares):
        if share > 0.9:  # of one calibration window
            assert index in found
    other = cut_windows(
        Source("c", (prose(50, 500),), None), TOKENIZER, count=None, calibration=0, **cut
    )
    assert calibrated_windows(read(done), other) == ()


def test_bare_tensors_are_compared_too() -> None:
    text = prose(3, 400)
    stream = tokens(text, TOKENIZER)
    model = small_opt()[0]
    made = fxquant.convert(model, "w8a8-static", calibration=[stream[96:192].view(2, 48)])
    asked = cut_windows(
        Source("t", (text,), None), TOKENIZER, count=6, length=48, calibration=0, seed=0
    )
    assert calibrated_windows(info(made).calibration, asked) == (2, 3)
    assert calibrated_windows(None, asked) == ()


def test_another_tokenizer_makes_the_whole_text_count() -> None:
    text = prose(4, 300)
    source = Source("t", (text,), None)
    done = cut_windows(source, TOKENIZER, count=1, length=24, calibration=1, seed=0)
    (found,) = read(done)
    assert found.origin is not None
    asked = cut_windows(source, TOKENIZER, count=3, length=24, calibration=0, seed=0)
    (text_,) = asked.places.texts
    otherwise = replace(asked.places, texts=(replace(text_, tokens_hash="sha256:other"),))
    assert calibrated_windows((found,), replace(asked, places=otherwise)) == (0, 1, 2)


@settings(max_examples=150, deadline=None)
@given(
    row=st.integers(FEWEST, 300),
    window=st.integers(FEWEST, 300),
    share=st.floats(0, 1.2),
    same_text=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_run_in_common_is_found_from_n_tokens_on(
    row: int, window: int, share: float, same_text: bool, seed: int
) -> None:
    """Wherever it stands in either. Of few tokens less each may count by chance, 1 in 128."""
    needed = run_needed(row, window, same_text)
    common = min(int(share * needed), row, window)
    draw = random.Random(seed)
    first, second = ([draw.randrange(1000) for _ in range(count)] for count in (row, window))
    at, to = draw.randint(0, row - common), draw.randint(0, window - common)
    second[to : to + common] = first[at : at + common]
    found = KnownRuns.read(written_runs(torch.tensor(first))).hold(torch.tensor(second), same_text)
    if needed <= common and (not same_text or min(row, window) >= 32):
        assert found
    if common < needed - 4:
        assert not found


@pytest.mark.parametrize("row", [64, 100, 128, 300, 512])
def test_a_row_that_is_cut_in_two_is_known_in_one_window(row: int) -> None:
    """In another text and in its own, at windows of any length from its own half on."""
    draw = torch.Generator().manual_seed(row)
    calibrated = torch.randint(1000, (row,), generator=draw)
    known = KnownRuns.read(written_runs(calibrated))
    for length in (row // 2, row - 1, row, 2 * row):
        for first in {0, row // 2, row // 3, row - 1, row}:
            stream = torch.randint(1000, (8 * row,), generator=draw)
            at = 2 * length - first
            stream[at : at + row] = calibrated
            windows = [stream[start : start + length] for start in range(0, 8 * row, length)]
            for same_text in (False, True):
                assert any(known.hold(window, same_text) for window in windows)


def test_what_repeats_itself_is_no_copy() -> None:
    """Rulers and tables: fewer than half of the grams differ. Nor is it called unseen."""
    for period in (1, 2, 20):
        rows = torch.arange(100, 100 + period).repeat(200 // period)
        known = KnownRuns.read(written_runs(rows))
        assert not known.hold(rows)
        assert not known.tell([rows])
    rows = torch.arange(40).repeat(5)
    assert KnownRuns.read(written_runs(rows)).hold(rows)


def test_phrases_of_honest_texts_are_not_counted() -> None:
    """CPython's help has tracebacks of the same words in all its splits."""
    texts = [builtin_text(split) for split in ("evaluation", "calibration")]
    streams = [tokens(text, TOKENIZER) for text in texts]
    for length in (256, 512):
        rows, windows = (stream[: len(stream) // length * length] for stream in streams)
        known = KnownRuns.read("".join(map(written_runs, rows.view(-1, length))))
        windows = windows.view(-1, length)
        assert not any(known.hold(window) for window in windows)
        assert known.tell(tuple(windows))


@pytest.mark.parametrize("length", [64, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_text_that_says_twice_what_is_calibrated_on_is_refused(length: int, seed: int) -> None:
    """Position finds nothing there."""
    said, other = prose(seed, 60), prose(seed + 50, 120)
    cut: dict[str, Any] = {"count": 2, "length": length, "seed": seed}
    for text, twice in ((f"{said} {other}", False), (f"{said} {other} {said}", True)):
        calibration = (len(ids_of(text)) - 2 * length) // length  # all that is left
        source = Source("t", (text,), None)
        if twice:
            with pytest.raises(DataError, match=r"holds? the text to calibrate on, t"):
                cut_windows(source, TOKENIZER, calibration=calibration, **cut)
        else:
            assert len(cut_windows(source, TOKENIZER, calibration=calibration, **cut).calibration)


@pytest.mark.parametrize("length", [9, 20, 30, 64])
def test_rows_shorter_than_a_window_are_known_inside_it(length: int) -> None:
    stream = tokens(prose(5, 500), TOKENIZER)
    rows = [stream[start : start + length] for start in (3, 200, 400)]
    made = fxquant.convert(small_opt()[0], "w8a8-static", calibration=rows)
    windows = stream[: len(stream) // 128 * 128].view(-1, 128)
    whole = [start // 128 for start in (3, 200) if start % 128 + length <= 128]
    assert set(whole) <= set(seen_rows(info(made).calibration, tuple(windows)))
    other = tokens(prose(55, 500), TOKENIZER)
    assert fxquant.evaluate(made, other[:256].view(2, 128)).overlap == 0
    with pytest.raises(DataError, match="of the 1 window holds what the graph was calibrated on"):
        fxquant.evaluate(made, windows[:1])


@pytest.mark.parametrize(
    ("calibrated", "evaluated"), [(64, FEWEST - 1), (FEWEST - 1, 64), (3, 64), (5, 5)]
)
def test_what_is_too_short_to_tell_is_not_called_unseen(calibrated: int, evaluated: int) -> None:
    stream = tokens(prose(6, 300), TOKENIZER)
    made = fxquant.convert(small_opt()[0], "w8a8-static", calibration=[stream[:calibrated]])
    found = fxquant.evaluate(made, stream[100 : 100 + evaluated])
    assert found.overlap is None
    assert "overlap with the calibration not checked" in str(found)


@pytest.mark.parametrize("length", [FEWEST, 20, 31, 32, SURE])
def test_what_is_long_enough_is_called_unseen(length: int) -> None:
    stream = tokens(prose(6, 300), TOKENIZER)
    made = fxquant.convert(small_opt()[0], "w8a8-static", calibration=[stream[:64]])
    assert fxquant.evaluate(made, stream[100 : 100 + length]).overlap == 0
    with pytest.raises(DataError, match="1 of the 1 window holds"):
        fxquant.evaluate(made, stream[5 : 5 + length])


def test_no_door_from_python_takes_what_is_calibrated_on() -> None:
    model = small_opt()[0]
    text = fxquant.windows(prose(7, 500), TOKENIZER, count=2, length=48, calibration=3)
    assert text.batches is not None
    for calibration in (text.batches, list(text.batches), text.calibration):
        made = fxquant.convert(model, "w8a8-static", calibration=calibration)
        assert fxquant.evaluate(made, text.evaluation).overlap == 0
        for data in (text.calibration, text.batches, list(text.batches)):
            with pytest.raises(DataError, match="3 of the 3 windows hold what the graph was"):
                fxquant.evaluate(made, data)
            assert fxquant.evaluate(made, data, allow_overlap=True).overlap == 3
            asked: dict[str, Any] = {"calibration": calibration, "data": data}
            with pytest.raises(DataError, match="data=: 3 of the 3 windows hold"):
                fxquant.explain(model, "w8a8-static", **asked)
            with pytest.raises(DataError, match="data=: 3 of the 3 windows hold"):
                fxquant.plan(model, budget=1, **asked)


# --- the commands ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "some.txt"
    file.write_text(prose(9, 500))
    return file


def arguments(text: Path, windows: int) -> list[str]:
    return ["--text", str(text), "--length", "32", "--windows", str(windows)]


def test_windows_that_convert_did_not_keep_are_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, out = tmp_path / "saved", tmp_path / "out"
    convert = ["convert", "--model", str(SMALL_OPT), "--scheme", "w8a8-static"]
    convert += ["--calibration-windows", "8", "--output", str(saved)]
    assert main([*convert, *arguments(text, 1)]) == 0
    copy = tmp_path / "copy.txt"
    copy.write_text(text.read_text())
    evaluate = ["evaluate", "--model", str(saved), "--output", str(out)]
    capsys.readouterr()
    for file in (text, copy):
        assert main([*evaluate, *arguments(file, 12), "--overwrite"]) == 2
        error = capsys.readouterr().err
        assert re.search(r"\d+ of the 12 windows of \w+.txt .*\(number .*\) holds? what", error)
        assert "--windows 12 --length 32" in error
    assert main([*evaluate, *arguments(text, 1), "--overwrite"]) == 0

    assert main([*evaluate, *arguments(text, 12), "--overwrite", "--allow-overlap"]) == 0
    row = json.loads((out / "results.json").read_text())["rows"][0]
    said = f"calibrated on {len(row['overlap'])} of the 12 evaluated windows"
    assert row["overlap"]
    assert f"w8a8-static [{said}]" in capsys.readouterr().out
    assert f"{said} (number {row['overlap'][0] + 1}" in (out / "table.md").read_text()
    assert main(["report", str(out)]) == 0
    assert said in (out / "report.html").read_text()

    assert main([*convert, *arguments(text, 12)]) == 0
    assert main([*evaluate, *arguments(text, 12), "--overwrite"]) == 0
    assert json.loads((out / "results.json").read_text())["rows"][0]["overlap"] == []


@pytest.mark.parametrize("command", ["convert", "inspect", "explain", "plan"])
def test_each_command_says_what_does_not_fit(
    command: str, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"plan": ["--budget", "1"]}.get(command, ["--scheme", "w8a8-static"])
    asked = [command, "--model", str(SMALL_OPT), *options, *arguments(text, 12)]
    assert main([*asked, "--calibration-windows", "500"]) == 2
    assert "the rest of some.txt has" in capsys.readouterr().err


def test_a_text_that_holds_the_evaluated_one_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither its name nor its hash is the evaluated text's."""
    longer = tmp_path / "longer.txt"
    longer.write_text(text.read_text() + "\n" + prose(77, 20))
    asked = ["evaluate", "--model", str(SMALL_OPT), "--schemes", "w8a8-static"]
    asked += [*arguments(text, 12), "--calibration-dataset", str(longer)]
    asked += ["--calibration-windows", "30"]
    assert main(asked) == 2
    error = capsys.readouterr().err
    assert "hold the text to calibrate on, longer.txt (whole text)" in error
    assert main([*asked, "--allow-overlap"]) == 0
    assert "w8a8-static [calibrated on " in capsys.readouterr().out
