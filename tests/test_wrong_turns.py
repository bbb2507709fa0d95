"""Wrong turns that a beginner takes from Python: each is one sentence that says what was meant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fxquant
from fxquant.errors import (
    ArgumentError,
    CalibrationError,
    CheckpointError,
    DataError,
    FxquantError,
    ModelError,
    SchemeError,
)
from fxquant.evaluation.datasets import looks_like_a_path
from fxquant.ir.counted import counted, part_of
from fxquant.ir.graph import info, update_info
from tests.models import SMALL_OPT, small_opt

MODEL, TOKENIZER = small_opt()
TEXT = fxquant.windows("builtin", TOKENIZER, count=2, length=64, calibration=2)
STATIC = "w8a8-static"


def ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(4, 1024, (rows, length), generator=torch.Generator().manual_seed(rows))


def convert(scheme: Any = STATIC, **options: Any) -> object:
    return fxquant.convert(MODEL, scheme, **options)


Turn = tuple[Callable[[], object], type[FxquantError], str]

TURNS: dict[str, Turn] = {
    "windows as calibration": (
        lambda: convert(calibration=TEXT), CalibrationError, r"is a Windows, .*pass its \.batches"
    ),
    "windows as data": (
        lambda: fxquant.explain(MODEL, STATIC, calibration=TEXT.batches, data=TEXT),  # type: ignore[arg-type]
        DataError, r"data is a Windows, .*pass its \.evaluation",
    ),
    "windows as plan's data": (
        lambda: fxquant.plan(MODEL, data=TEXT, budget=1.0),  # type: ignore[arg-type]
        DataError, r"data is a Windows, .*pass its \.evaluation",
    ),
    "a loaded model as calibration": (
        lambda: convert(calibration=fxquant.load_model(SMALL_OPT)),
        CalibrationError, r"is a LoadedModel, .*fxquant\.windows\(text, its \.tokenizer\)",
    ),
    "a path as calibration": (
        lambda: convert(calibration=Path("my.txt")), CalibrationError, "calibration is text"
    ),
    "a dict of another form": (
        lambda: convert({"weight": 3}), SchemeError, r"no key 'scheme', unknown keys \['weight'\]"
    ),
    "overrides as a list": (
        lambda: convert({"scheme": "w8", "overrides": ["fp"]}),
        SchemeError, "overrides is a list, not an object",
    ),
    "a list in a JSON file's text": (
        lambda: fxquant.Scheme.from_json("[1]"), SchemeError, "it is a list, not an object"
    ),
    "the command line's word": (
        lambda: fxquant.windows("builtin", TOKENIZER, windows=4),  # type: ignore[call-arg]
        ArgumentError, r"windows: no argument windows= \(did you mean count=\?\)\. It takes w",
    ),
    "another word of the command line": (
        lambda: fxquant.windows("builtin", TOKENIZER, calibration_windows=4),  # type: ignore[call-arg]
        ArgumentError, r"did you mean calibration=\?",
    ),
    "a misspelt word": (
        lambda: fxquant.evaluate(MODEL, TEXT, batchsize=2),  # type: ignore[call-arg]
        ArgumentError, r"no argument batchsize= \(did you mean batch_size=\?\)",
    ),
    "a strange word": (
        lambda: convert(zzz=2), ArgumentError, r"no argument zzz=\. It takes convert\(model, sch"
    ),
    "data to convert": (lambda: convert(data=ids()), ArgumentError, r"did you mean calibration=\?"),
    "windows to explain": (
        lambda: fxquant.explain(MODEL, STATIC, calibration=ids(), windows=ids()),  # type: ignore[call-arg]
        ArgumentError, r"did you mean data=\?",
    ),
    "transformers' word": (
        lambda: fxquant.load_model(SMALL_OPT, torch_dtype=torch.float16),  # type: ignore[call-arg]
        ArgumentError, r"did you mean dtype=\?",
    ),
    "by position": (
        lambda: fxquant.convert(MODEL, STATIC, ids()),  # type: ignore[call-arg]
        ArgumentError, r"too many positional arguments\. It .*by name what stands behind",
    ),
    "nothing to cut with": (
        lambda: fxquant.windows("builtin"),  # type: ignore[call-arg]
        ArgumentError, "missing a required argument: 'tokenizer'",
    ),
    "no budget": (
        lambda: fxquant.plan(MODEL, data=ids()),
        SchemeError, "either budget=.* or bits=",
    ),
    "a count as text": (
        lambda: fxquant.windows("builtin", TOKENIZER, count="3"),  # type: ignore[arg-type]
        DataError, "count must be a whole number, got '3', a str",
    ),
    "a length as a float": (
        lambda: fxquant.windows("builtin", TOKENIZER, length=64.0),  # type: ignore[arg-type]
        DataError, "length must be a whole number, got 64.0",
    ),
    "a seed below zero": (
        lambda: fxquant.windows("builtin", TOKENIZER, seed=-1), DataError, r"seed must be 0 to 2"
    ),
    "windows of calibration too short": (
        lambda: fxquant.windows("builtin", TOKENIZER, calibration_length=1),
        DataError, "got 1 calibration window of 1 token and 16 to calibrate on",
    ),
    "a batch size as text": (
        lambda: fxquant.evaluate(MODEL, TEXT, batch_size="2"),  # type: ignore[arg-type]
        DataError, "batch_size must be a whole number",
    ),
    "a dict of text": (
        lambda: fxquant.windows({"text": "a b"}, TOKENIZER), DataError, "not a dict"
    ),
    "a wrong path of a model": (
        lambda: fxquant.load_model(f"{SMALL_OPT.parent}/modle"),
        ModelError, r"no model directory .*\(did you mean '.*/model'\?\)",
    ),
    "a model's file": (
        lambda: fxquant.load_model(SMALL_OPT / "config.json"),
        ModelError, "config.json is a file: give the directory",
    ),
    "a dtype that is none": (
        lambda: fxquant.load_model(SMALL_OPT, dtype="fp16"),
        ModelError, "unknown dtype 'fp16': known are auto, float32, float16, bfloat16",
    ),
    "a name as tokenizer to save": (
        lambda: fxquant.save(fxquant.trace(MODEL), "never", "gpt2"),
        CheckpointError, "a str is no tokenizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("turn", TURNS)
def test_a_wrong_turn_is_one_sentence(turn: str) -> None:
    step, kind, message = TURNS[turn]
    with pytest.raises(kind, match=message) as caught:
        step()
    assert "Traceback" not in str(caught.value)


def test_an_argument_error_is_a_type_error_and_errors_within_stay_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert issubclass(ArgumentError, TypeError)

    def broken(*_: object) -> object:
        raise TypeError("a bug")

    monkeypatch.setattr("fxquant.recipes.conversion.as_scheme", broken)
    with pytest.raises(TypeError, match=r"^a bug$") as caught:
        convert("w8")
    assert not isinstance(caught.value, FxquantError)


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "my text.txt").write_text("some words " * 200)
    for given, near in (("my txt.txt", "my text.txt"), ("nothing.txt", "")):
        for form in (str, Path):
            with pytest.raises(DataError, match="no such file") as caught:
                fxquant.windows(form(tmp_path / given), TOKENIZER)
            assert ("did you mean" in str(caught.value)) == bool(near)
            assert near in str(caught.value)
            assert "known are builtin, wikitext2" in str(caught.value)
    with pytest.raises(DataError, match="there is no folder"):
        fxquant.windows(str(tmp_path / "no" / "my.txt"), TOKENIZER)
    with pytest.raises(DataError, match=r"unknown dataset 'wikitext-2'.*did you mean wikitext2\?"):
        fxquant.windows("wikitext-2", TOKENIZER)


@pytest.mark.parametrize(
    ("text", "is_path"),
    [
        ("my.txt", True), ("my file.txt", True), ("a/b", True), ("./texts", True),
        ("some words of prose.", False), ("It ends so", False), ("one.\ntwo.txt", False),
        ("yes/no is no path here", False), ("x" * 300 + ".txt", False), ("3.5 of 7.5", False),
    ],
)  # fmt: skip
def test_what_looks_like_a_path(text: str, is_path: bool) -> None:
    assert looks_like_a_path(text) == is_path


def test_torch_s_own_dtypes_are_taken() -> None:
    loaded = fxquant.load_model(SMALL_OPT, dtype=torch.bfloat16)
    assert next(loaded.model.parameters()).dtype == torch.bfloat16
    with pytest.raises(ModelError, match="unknown dtype 'int8'"):
        fxquant.load_model(SMALL_OPT, dtype=torch.int8)


def test_windows_say_what_they_are() -> None:
    said = str(TEXT)
    assert said == repr(TEXT)
    for words in (
        "the first 2 windows of 64 tokens", "token ids int64 [2, 64]",
        "2 windows of 64 from builtin (calibration topics, grid), seed 0",
        "calibration=windows.batches",
    ):  # fmt: skip
        assert words in said
    bare = str(fxquant.windows("builtin", TOKENIZER, count=1, calibration=0))
    assert "calibration: none" in bare
    assert "the first window of 512 tokens" in bare


def test_an_evaluation_says_where_the_weights_and_the_calibration_are_from() -> None:
    graph = fxquant.trace(MODEL)
    update_info(graph, weights="dequantized from GGUF: 100.00% Q4_1")
    qmodel = fxquant.convert(graph, STATIC, calibration=TEXT.batches)
    found = fxquant.evaluate(qmodel, TEXT)
    assert found.weights == info(qmodel).weights == "dequantized from GGUF: 100.00% Q4_1"
    assert f"{found.model} (weights {found.weights}), builtin" in str(found)
    assert "calibrated on 2 windows of 64 from builtin (calibration topics, grid)," in str(found)
    plain = str(replace(found, weights=""))
    assert "weights" not in plain
    assert "calibrated on nothing" in str(fxquant.evaluate(MODEL, TEXT))


def test_counts_have_singular_forms() -> None:
    assert [counted(n, "token") for n in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]
    assert counted(2, "batch", "batches") == "2 batches"
    assert part_of(1, 8, "window") == "1 of the 8 windows holds"
    assert part_of(1, 1, "window") == "1 of the 1 window holds"
    assert part_of(3, 8, "window") == "3 of the 8 windows hold"


def test_one_of_each_is_said_as_one(tmp_path: Path) -> None:
    """One window of two tokens, calibrated on one row, in all that is printed of it."""
    cut = fxquant.windows("builtin", TOKENIZER, count=1, length=2, calibration=1)
    qmodel = fxquant.convert(MODEL, STATIC, calibration=cut.batches)
    bare = fxquant.convert(MODEL, STATIC, calibration=ids(1, 1))
    said = [str(cut), str(fxquant.evaluate(qmodel, cut)), str(fxquant.inspect(qmodel))]
    said += [str(fxquant.inspect(bare)), str(fxquant.evaluate(bare, cut))]
    for record in (*(info(qmodel).calibration or ()), *(info(bare).calibration or ())):
        said.append(record.line())
    assert "1 row of 1 token of unknown text" in said[-1]
    for text in said:
        for plural in ("windows", "tokens", "rows", "batches", "threads", "documents"):
            assert f" 1 {plural}" not in text, text
