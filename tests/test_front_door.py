"""The way in from Python: load, cut a text, convert, evaluate; and what users hand over instead."""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxquant
from fxquant.cli import main
from fxquant.errors import DataError, FxquantError, ModelError, SchemeError
from fxquant.evaluation import Job, Windows, cut_windows, load_text, run
from fxquant.evaluation import data as data_module
from fxquant.graph import info
from fxquant.schemes import Scheme, brief
from tests.models import SMALL_OPT, small_opt

ROOT = Path(__file__).parent.parent
MODEL, TOKENIZER = small_opt()
GRAPH = fxquant.trace(MODEL)
PROSE = "Six lines of text are enough.\nThe seventh says why: nothing else was asked for.\n" * 80


def ids(rows: int, length: int, seed: int = 3) -> Tensor:
    return torch.randint(4, 1024, (rows, length), generator=torch.Generator().manual_seed(seed))


# The door


def test_the_figures_are_those_of_the_command_line() -> None:
    setting = {"windows": 3, "length": 48, "calibration_windows": 2, "seed": 7}
    rows = run(Job(model=str(SMALL_OPT), schemes=("w8a8-static:p95",), **setting)).rows  # type: ignore[arg-type]
    loaded = fxquant.load_model(str(SMALL_OPT))
    cut = fxquant.windows("builtin", loaded.tokenizer, count=3, length=48, calibration=2, seed=7)
    base = fxquant.evaluate(loaded.model, cut)
    qmodel = fxquant.convert(loaded.model, "w8a8-static:p95", calibration=cut.calibration)
    found = fxquant.evaluate(qmodel, cut)
    assert (base.loss, found.loss) == (rows[0].loss, rows[1].loss)
    assert (base.share_clipped, found.share_clipped) == (None, rows[1].share_clipped)
    assert found.perplexity == rows[1].perplexity == math.exp(found.loss)
    assert (found.windows, found.tokens) == (3, 3 * 47)
    change = found - base
    assert (change.delta, change.error) == (rows[1].delta_loss, rows[1].delta_error)
    assert str(found - found) == "+0.0000 ± 0.0000"


def test_the_standard_error_is_that_of_the_windows_means() -> None:
    found = fxquant.evaluate(GRAPH, ids(5, 24))
    means = [nll / 23 for nll in found.sums.nll]
    assert found.error == pytest.approx(statistics.stdev(means) / math.sqrt(5))
    assert fxquant.evaluate(GRAPH, ids(1, 24)).error is None


def test_an_evaluation_says_what_made_it() -> None:
    cut = fxquant.windows("builtin", TOKENIZER, count=2, length=32, calibration=0)
    printed = str(fxquant.evaluate(GRAPH, cut, batch_size=2))
    assert printed.startswith("fp: loss ")
    for words in (
        "62 tokens scored in 2 windows", "builtin (evaluation topics", "the first 2 windows of 32",
        "batch size 2, float32 on cpu (1 threads)", f"torch {torch.__version__}", "sha256:",
    ):  # fmt: skip
        assert words in printed
    assert "clipped" not in printed  # nothing is quantized
    dynamic = fxquant.convert(GRAPH, "w8a8-dynamic")
    assert "clipped 0.0000%" in str(fxquant.evaluate(dynamic, cut))
    given = str(fxquant.evaluate(GRAPH, ids(2, 9)))
    assert "token ids as given" in given


def test_a_difference_needs_the_same_windows() -> None:
    cut = fxquant.windows("builtin", TOKENIZER, count=2, length=32, calibration=0)
    other = fxquant.windows("builtin", TOKENIZER, count=2, length=32, calibration=0, stride=8)
    base = fxquant.evaluate(GRAPH, cut)
    assert (fxquant.evaluate(GRAPH, cut.evaluation) - base).delta == 0  # as ids: the same windows
    for different in (other, cut.evaluation.flip(0), cut.evaluation[:1], ids(2, 32)):
        with pytest.raises(DataError, match="a difference needs the same windows: fp was"):
            fxquant.evaluate(GRAPH, different) - base
    with pytest.raises(TypeError, match="unsupported operand"):
        base - 3.0  # type: ignore[operator]


WAYS: dict[str, Callable[[Path], Any]] = {
    "a path as text": lambda path: str(path),
    "a path": lambda path: path,
    "the text itself": lambda path: path.read_text(),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_text_is_given_as_itself_or_by_its_path(way: str, tmp_path: Path) -> None:
    path = tmp_path / "my text.txt"
    path.write_text(PROSE)
    cut = fxquant.windows(WAYS[way](path), TOKENIZER, count=2, length=16, calibration=3)
    expected = cut_windows(
        load_text(str(path)), TOKENIZER, count=2, length=16, calibration=3, seed=0
    )
    assert torch.equal(cut.evaluation, expected.evaluation)
    assert torch.equal(cut.calibration, expected.calibration)


def test_documents_are_joined_by_an_empty_line() -> None:
    documents = [PROSE[:1000], PROSE[1000:2000]]
    cut = fxquant.windows(documents, TOKENIZER, count=2, length=16, calibration=3)
    whole = fxquant.windows("\n\n".join(documents), TOKENIZER, count=2, length=16, calibration=3)
    assert torch.equal(cut.evaluation, whole.evaluation)
    assert "2 documents (whole text: all documents joined by" in cut.protocol.line()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(40, 400),
    count=st.integers(1, 6),
    length=st.integers(2, 16),
    calibration=st.integers(0, 6),
    calibration_length=st.one_of(st.none(), st.integers(2, 16)),
    stride=st.one_of(st.none(), st.integers(1, 16)),
    seed=st.integers(0, 9),
)
def test_calibration_and_evaluation_share_no_token(
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    count: int,
    length: int,
    calibration: int,
    calibration_length: int | None,
    stride: int | None,
    seed: int,
) -> None:
    """Each token's id is its place in the text."""
    monkeypatch.setattr(data_module, "tokens", lambda text, tokenizer: torch.arange(tokens))
    step = min(stride, length) if stride else length
    other = calibration_length or length
    used = (count - 1) * step + length

    def cut(calibration: int) -> Windows:
        return fxquant.windows(
            *(PROSE, TOKENIZER),
            **{"count": count, "length": length, "calibration": calibration, "seed": seed},
            **{"stride": step, "calibration_length": calibration_length},  # type: ignore[arg-type]
        )

    if tokens < used or (tokens - used) // other < calibration:
        with pytest.raises(DataError, match="too short"):
            cut(calibration)
        return
    found = cut(calibration)
    assert found.evaluation.shape == (count, length)
    assert found.calibration.shape == (calibration, other)
    assert not set(found.evaluation.flatten().tolist()) & set(found.calibration.flatten().tolist())
    assert torch.equal(cut(0).evaluation, found.evaluation)  # whatever it is calibrated on


BAD_TEXTS: dict[str, tuple[Any, str]] = {
    "a name": ("wikitext", "unknown dataset 'wikitext': known are builtin, wikitext2"),
    "two protocols": ("c4", "c4 has two protocols"),
    "no such file": ("no/such/file.txt", "unknown dataset 'no/such/file.txt'.*path of a text"),
    "no such path": (Path("no/such.txt"), "unknown dataset"),
    "a short text": (
        "only a few words",
        "the text 'only a few words' is too short",
    ),
    "nothing": ("", "the text is empty"),
    "blanks": (" \n", "the text is empty"),
    "no documents": ([], "a text is a string, a path or a list of strings, not a list"),
    "numbers": ([1, 2], "not a list of int"),
    "ids": (ids(1, 9), "not a Tensor of Tensor"),
    "one number": (3, "not a int"),
}


@pytest.mark.parametrize("what", BAD_TEXTS)
def test_a_text_that_is_none(what: str) -> None:
    text, message = BAD_TEXTS[what]
    with pytest.raises(DataError, match=message):
        fxquant.windows(text, TOKENIZER)


def test_what_evaluate_refuses() -> None:
    with pytest.raises(DataError, match=r"needs the model's tokenizer: evaluate\(model, text, tok"):
        fxquant.evaluate(GRAPH, "builtin")
    with pytest.raises(DataError, match="a str is no tokenizer: pass fxquant"):
        fxquant.windows("builtin", "gpt2")
    with pytest.raises(DataError, match="a OPTForCausalLM is no tokenizer"):
        fxquant.windows("builtin", MODEL)
    with pytest.raises(DataError, match="batch size must be at least 1"):
        fxquant.evaluate(GRAPH, ids(1, 8), batch_size=0)
    with pytest.raises(DataError, match=r"token ids .* are outside the vocabulary of 1024"):
        fxquant.evaluate(GRAPH, ids(1, 8) + 1024)
    with pytest.raises(DataError, match="windows of 5 to 8 tokens"):
        fxquant.evaluate(GRAPH, [ids(1, 8), ids(1, 5)])
    with pytest.raises(DataError, match="513 tokens, but the model has 512 positions"):
        fxquant.evaluate(GRAPH, ids(1, 513))
    with pytest.raises(DataError, match="window 0 is padded"):
        fxquant.evaluate(GRAPH, TOKENIZER(["a b c", "a"], padding=True, return_tensors="pt"))
    observed = fxquant.convert(GRAPH, "w8a8-static", calibration=ids(2, 8), level="observed")
    with pytest.raises(DataError, match="an observed graph counts all it sees"):
        fxquant.evaluate(observed, ids(1, 8))
    for model in ("facebook/opt-125m", fxquant.load_model(str(SMALL_OPT))):
        with pytest.raises(ModelError, match=r"not a Hugging Face model: .*load_model\(name\)"):
            fxquant.evaluate(model, ids(1, 8))


def test_a_text_and_what_a_tokenizer_returns_can_be_evaluated() -> None:
    whole = fxquant.evaluate(GRAPH, "builtin", TOKENIZER)
    cut = fxquant.windows("builtin", TOKENIZER)
    assert whole.digest == fxquant.evaluate(GRAPH, cut).digest
    one = TOKENIZER(PROSE[:200], return_tensors="pt")
    assert fxquant.evaluate(GRAPH, one).loss == fxquant.evaluate(GRAPH, one["input_ids"]).loss


def test_models_and_saved_graphs_load_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = fxquant.windows("builtin", TOKENIZER, count=2, length=32, calibration=2)
    qmodel = fxquant.convert(MODEL, "w8a8-static", calibration=cut.calibration)
    fxquant.save(qmodel, tmp_path / "saved", TOKENIZER)
    saved = fxquant.load_model(str(tmp_path / "saved"))
    recut = fxquant.windows("builtin", saved.tokenizer, count=2, length=32, calibration=0)
    assert str(fxquant.evaluate(saved.model, recut) - fxquant.evaluate(qmodel, cut)) == (
        "+0.0000 ± 0.0000"
    )
    monkeypatch.setattr("fxquant.evaluation.models.package_model", lambda name: SMALL_OPT)
    packaged = fxquant.load_model("package:anything")
    assert (fxquant.evaluate(packaged.model, cut) - fxquant.evaluate(MODEL, cut)).delta == 0


def test_a_graph_saved_without_a_tokenizer_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bare"
    fxquant.save(fxquant.convert(GRAPH, "w8"), folder)
    with pytest.raises(ModelError, match=r"saved without a tokenizer.*fxquant\.save\(graph, dir"):
        fxquant.load_model(str(folder))
    assert main(["evaluate", "--model", str(folder), "--windows", "1", "--length", "32"]) == 2
    printed = capsys.readouterr().err
    assert "was saved without a tokenizer" in printed
    assert "pip install" not in printed
    assert info(fxquant.load(folder)).scheme == "w8"


def test_importing_reads_no_dataset_library() -> None:
    code = (
        "import sys, fxquant; print(sorted({'datasets', 'pyarrow', 'pandas'} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"


def test_what_readme_says_it_does_not_do() -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## What it does not do\n")[1].split("\n## ")[0]
    bold = re.findall(r"^- \*\*(.+)\*\*", section, re.MULTILINE)
    assert bold == ["Generate.", "Train.", "Deploy.", "Tasks.", "Speak for other kernels."]
    qmodel = fxquant.convert(GRAPH, "w8a8-dynamic")
    with pytest.raises((AttributeError, FxquantError)):
        qmodel.generate(ids(1, 4))
    assert not any(each.requires_grad for each in (*qmodel.parameters(), *qmodel.buffers()))
    assert not {"export", "train", "tasks", "generate"} & set(vars(fxquant))


# Schemes as data

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
    "batches": ([ids(1, 4)], "not a list"),
    "a number": (8, "not a int"),
    "a tokenizer": (TOKENIZER, "not a PreTrainedTokenizerFast"),
    "a spec": (Scheme.parse("w8").spec, "not a SiteSpec"),
    "an empty dict": ({}, r"scheme JSON not understood \(KeyError: 'scheme'\)"),
    "another dict": ({"w8": True}, "scheme JSON not understood"),
    "a key too many": ({"scheme": "w8", "bits": 4}, r"unknown keys \['bits'\]"),
    "a dict of objects": ({"scheme": Scheme()}, "scheme JSON not understood .TypeError"),
    "a dict of numbers": ({"scheme": 8}, "a scheme inside JSON is text"),
    "no file": ("no/such/plan.json", r"cannot read scheme no/such/plan\.json"),
    "a folder": (Path("docs"), "cannot read scheme docs"),
    "another file": (Path("README.md"), r"README\.md: scheme JSON not understood"),
    "a file of bytes": (SMALL_OPT / "model.safetensors", "cannot read scheme"),
}


@pytest.mark.parametrize("what", BAD_SCHEMES)
def test_a_scheme_that_is_none(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(model: object) -> Any:
        raise AssertionError("traced before the scheme was checked")

    monkeypatch.setattr("fxquant.conversion.trace", work)
    monkeypatch.chdir(ROOT)
    scheme, message = BAD_SCHEMES[what]
    for door in (fxquant.convert, fxquant.explain):
        with pytest.raises(SchemeError, match=message):
            door(MODEL, scheme)


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
    assert "cannot read scheme" in capsys.readouterr().err


def test_brief_names_of_schemes() -> None:
    assert brief("w8a8-static+smooth") == "w8a8-static+smooth"
    one = '{"scheme": "w8", "overrides": {"head": "w8"}}'
    assert brief(one) == one
    long = str(Scheme.from_json(json.dumps(OVERRIDES)))
    assert brief(long).startswith("w8a8-dynamic, 3 overrides (sha256:")
    other = long.replace('"w4"', '"w3"')
    assert brief(other) != brief(long)
