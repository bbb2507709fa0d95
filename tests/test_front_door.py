"""The way in from Python: load, cut a text, convert, evaluate; and what users hand over instead."""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import fxquant
from fxquant.cli.main import main
from fxquant.errors import DataError, FxquantError, ModelError
from fxquant.evaluation import Job, Windows, cut_windows, load_text, run
from fxquant.ir.graph import info
from tests.models import SMALL_OPT, small_opt
from tests.processes import finished

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
        "batch size 2, float32 on cpu at level float (1 thread)", f"torch {torch.__version__}",
        "sha256:",
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


def numbered(words: int) -> tuple[str, PreTrainedTokenizerFast]:
    """A text, and a tokenizer by which each token's id is its place in it."""
    core = Tokenizer(WordLevel({f"w{n}": n for n in range(words)}, unk_token="w0"))
    core.pre_tokenizer = WhitespaceSplit()
    text = " ".join(f"w{n}" for n in range(words))
    return text, PreTrainedTokenizerFast(tokenizer_object=core)


@settings(deadline=None)
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
    tokens: int,
    count: int,
    length: int,
    calibration: int,
    calibration_length: int | None,
    stride: int | None,
    seed: int,
) -> None:
    step = min(stride, length) if stride else length
    other = calibration_length or length
    used = (count - 1) * step + length

    text, tokenizer = numbered(tokens)

    def cut(calibration: int) -> Windows:
        return fxquant.windows(
            text,
            tokenizer,
            count=count,
            length=length,
            calibration=calibration,
            seed=seed,
            stride=step,
            calibration_length=calibration_length,
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
    "no such file": ("no/such/file.txt", "no such file 'no/such/file.txt': there is no folder"),
    "no such path": (Path("no/such.txt"), "no such file .*known are builtin, .*path of a text"),
    "a short text": (
        "only a few words",
        "^the text 'only a few words' is too short",
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
    by_path = fxquant.load_model(SMALL_OPT)
    assert (by_path.name, by_path.revision) == (str(SMALL_OPT), packaged.revision)
    with pytest.raises(ModelError, match=r"name must be a path, .*, not a OPTForCausalLM$"):
        fxquant.load_model(MODEL)
    assert (fxquant.evaluate(packaged.model, cut) - fxquant.evaluate(MODEL, cut)).delta == 0


def test_a_graph_saved_without_a_tokenizer_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bare"
    fxquant.save(fxquant.convert(GRAPH, "w8"), folder)
    with pytest.raises(ModelError, match=r"holds no tokenizer.*fxquant\.save"):
        fxquant.load_model(str(folder))
    assert main(["evaluate", "--model", str(folder), "--windows", "1", "--length", "32"]) == 2
    printed = capsys.readouterr().err
    assert "holds no tokenizer" in printed
    assert not any(library in printed for library in ("sentencepiece", "tiktoken", "install"))
    assert info(fxquant.load(folder)).scheme == "w8"


def test_importing_reads_no_dataset_library() -> None:
    code = (
        "import sys, fxquant; print(sorted({'datasets', 'pyarrow', 'pandas'} & set(sys.modules)))"
    )
    done = finished([sys.executable, "-c", code])
    assert done.stdout.strip() == "[]", done.stderr


def test_what_readme_says_it_does_not_do() -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## What it does not do\n")[1].split("\n## ")[0]
    bold = re.findall(r"^- \*\*(.+)\*\*", section, re.MULTILINE)
    assert bold == ["Generate.", "Train.", "Serve.", "Tasks.", "Speak for other kernels."]
    qmodel = fxquant.convert(GRAPH, "w8a8-dynamic")
    with pytest.raises((AttributeError, FxquantError)):
        qmodel.generate(ids(1, 4))  # type: ignore[operator]
    assert not any(each.requires_grad for each in (*qmodel.parameters(), *qmodel.buffers()))
    assert not {"export", "train", "tasks", "generate"} & set(vars(fxquant))
