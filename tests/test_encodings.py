"""What users hand over as tokens: what a tokenizer returns, arrays, lists, loaders; and text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fxquant
from fxquant.analysis.inputs import as_windows
from fxquant.errors import CalibrationError, DataError, FxquantError
from fxquant.ir.graph import info
from fxquant.run.batches import model_inputs
from fxquant.run.encodings import TEXT_TO_BATCHES, batches_of
from fxquant.schemes.scheme import Scheme
from tests.models import SMALL_OPT, small_opt
from tests.test_conversion import same_tensors, tensors

MODEL, TOKENIZER = small_opt()
GRAPH = fxquant.trace(MODEL)

TEXTS = ["The quick brown fox jumps", "over the lazy dog and on", "a b c d"]
ROWS: list[list[int]] = TOKENIZER(TEXTS)["input_ids"]
EVEN = torch.tensor([row[:4] for row in ROWS])
SEPARATE = [torch.tensor([row]) for row in ROWS]


def padded() -> Any:
    return TOKENIZER(TEXTS, padding=True, return_tensors="pt")


def with_labels(count: int = 3) -> DataLoader[Any]:
    rows = [{"input_ids": EVEN[n], "labels": EVEN[n], "length": 4} for n in range(count)]
    return DataLoader(rows, batch_size=2)  # type: ignore[arg-type]


# name: (what is handed over, the batches [b, L] that it stands for)
FORMS: dict[str, tuple[Callable[[], Any], list[Any]]] = {
    "one encoding": (padded, [padded()]),
    "lists of one length": (lambda: TOKENIZER(TEXTS, padding=True), [padded()]),
    "one text's lists": (lambda: TOKENIZER(TEXTS[0]), SEPARATE[:1]),
    "one text's tensors": (lambda: TOKENIZER(TEXTS[0], return_tensors="pt"), SEPARATE[:1]),
    "numpy": (lambda: TOKENIZER(TEXTS, padding=True, return_tensors="np"), [padded()]),
    "a list of encodings": (lambda: [TOKENIZER(text) for text in TEXTS], SEPARATE),
    "a generator": (lambda: (TOKENIZER(text) for text in TEXTS), SEPARATE),
    "a plain dict": (lambda: dict(TOKENIZER(TEXTS[0])), SEPARATE[:1]),
    "rows of several lengths": (lambda: ROWS, SEPARATE),
    "one row": (lambda: ROWS[0], SEPARATE[:1]),
    "a batch of lists": (lambda: [EVEN.tolist()], [EVEN]),
    "one tensor": (lambda: EVEN, list(EVEN.split(1))),
    "one row's tensor": (lambda: EVEN[0], [EVEN[:1]]),
    "rows' tensors": (lambda: list(EVEN), list(EVEN.split(1))),
    "int32": (lambda: [EVEN.to(torch.int32)], [EVEN]),
    "uint16 of a file of tokens": (lambda: [EVEN.numpy().astype(np.uint16)], [EVEN]),
    "an array": (lambda: EVEN.numpy(), list(EVEN.split(1))),
    "a DataLoader with labels": (with_labels, [EVEN[:2], EVEN[2:]]),
    "a DataLoader of tensors": (lambda: DataLoader(TensorDataset(EVEN), batch_size=3), [EVEN]),
    "a dataset": (lambda: datasets.Dataset.from_dict(dict(TOKENIZER(TEXTS))), SEPARATE),
}


def plain(batch: Any) -> dict[str, Tensor]:
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_tokens(form: str) -> None:
    make, batches = FORMS[form]
    found = [model_inputs(each, info(GRAPH), n) for n, each in enumerate(batches_of(make()))]
    assert len(found) == len(batches)
    for ours, batch in zip(found, batches, strict=True):
        for name, value in plain(batch).items():
            assert torch.equal(ours[name], value)
        mask = ours.get("attention_mask")
        assert mask is None or isinstance(batch, Tensor) <= bool(mask.all())


@pytest.mark.parametrize("form", ["one encoding", "rows of several lengths", "a dataset"])
def test_they_calibrate_ranges_and_repairs_alike(form: str) -> None:
    make, batches = FORMS[form]
    scheme = "w8a8-static:absmax+smooth"
    ours = fxquant.convert(GRAPH, scheme, calibration=make())
    theirs = fxquant.convert(GRAPH, scheme, calibration=list(map(plain, batches)))
    assert same_tensors(tensors(ours), tensors(theirs))


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_windows(form: str) -> None:
    """What explain and plan take as data is the same, without padding."""
    make, batches = FORMS[form]
    if not all(isinstance(each, Tensor) for each in batches):
        with pytest.raises(DataError, match="window 0 is padded"):
            as_windows(make(), GRAPH)
        return
    found = as_windows(make(), GRAPH)
    assert len(found) == len(batches)
    assert all(torch.equal(a, b) for a, b in zip(found, batches, strict=True))


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)
TEXT = r"is text, and a graph reads token ids\. These lines cut it:"
REFUSED: dict[str, tuple[Any, str]] = {
    "a string": ("hello there", f"calibration {TEXT}"),
    "bytes": (b"hello there", f"calibration {TEXT}"),
    "strings": (TEXTS, f"calibration {TEXT}"),
    "a tuple of strings": (tuple(TEXTS), f"calibration {TEXT}"),
    "strings one by one": (iter(TEXTS), f"batch 0 {TEXT}"),
    "a batch of strings": (iter([TEXTS]), f"batch 0 {TEXT}"),
    "a column of strings": (datasets.Dataset.from_dict({"text": TEXTS}), "no input_ids among text"),
    "strings as ids": ([{"input_ids": TEXTS}], f"batch 0: input_ids {TEXT}"),
    "no ids": ([{"attention_mask": [1]}], "batch 0: no input_ids among attention_mask"),
    "ids that are None": ({"input_ids": None}, "batch 0: no input_ids among input_ids"),
    "nothing in a dict": ([{}], "batch 0: no input_ids among no inputs"),
    "rows of several lengths": (
        TOKENIZER(TEXTS),
        r"batch 0: input_ids has rows of \d+ to \d+ tokens: tokenizer\(texts, padding=T",
    ),
    "a tokenizer": (
        TOKENIZER,
        rf"calibration is a {type(TOKENIZER).__name__}.*=tokenizer\(text, return_tensors='pt'\)",
    ),
    "windows": (
        fxquant.windows("builtin", TOKENIZER, count=1, length=9, calibration=1),
        r"calibration is a Windows, .*; pass its \.batches",
    ),
    "a model": (MODEL, "calibration is a OPTForCausalLM, not an iterable"),
    "a number": (7, "calibration is a int, not an iterable"),
    "no axis": (torch.tensor(7), "calibration is a Tensor, not an iterable"),
    "a scheme": (Scheme(), "calibration is a Scheme, not an iterable"),
    "words in lists": ([[["a", "b"]]], f"calibration {TEXT}"),
    "transposed by a DataLoader": (
        DataLoader([TOKENIZER(TEXTS[0]).data], batch_size=1),  # type: ignore[arg-type]
        "batch 0: input_ids is a list of .* tensors, whose axes nothing tells",
    ),
    "pairs": ([(EVEN, EVEN)], "batch 0: input_ids is a list of 2 tensors"),
    "an embedding": ([{"inputs_embeds": EVEN * 1.0}], "no input_ids among inputs_embeds"),
    "truth": ([EVEN > 9], r"batch 0: input_ids must be integers .*torch\.bool"),
    "fractions": ([[0.5, 1.5]], r"batch 0: input_ids must be integers .*torch\.float32"),
    "sets": ([{"input_ids": {1, 2}}], "expected a LongTensor .* got set"),
    "an unknown thing in it": ([None], "expected a LongTensor .* got NoneType"),
    "beyond int64": ([[2**70]], "batch 0: input_ids holds no numbers"),
    "mixed": ([[1, "a"]], "batch 0: input_ids holds no numbers"),
    "a list within itself": (ENDLESS, "batch 0: input_ids"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_calibration_that_is_none(what: str) -> None:
    given, message = REFUSED[what]
    with pytest.raises(CalibrationError, match=message):
        fxquant.convert(GRAPH, "w8a8-static", calibration=given)


def test_the_lines_that_cut_a_text_run() -> None:
    """``explain`` shows the same lines; they are what the error says, and they work."""
    with pytest.raises(DataError) as caught:
        fxquant.explain(GRAPH, "w8", data="my text")
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert tuple(lines) == TEXT_TO_BATCHES
    space: dict[str, Any] = {"fxquant": fxquant, "name": str(SMALL_OPT), "text": "builtin"}
    exec("\n".join(lines), space)
    fxquant.convert(GRAPH, "w8a8-static", calibration=space["cut"].calibration)


def test_nothing_is_read_ahead_of_its_use() -> None:
    endless = (EVEN for _ in iter(int, 1))
    assert batches_of(endless) is endless


# The converted graph takes it too


def test_a_converted_graph_takes_an_encoding(tmp_path: Path) -> None:
    qmodel = fxquant.convert(GRAPH, "w8a8-static", calibration=padded())
    given = padded()
    given["token_type_ids"] = torch.zeros_like(given["input_ids"])  # as many tokenizers return
    expected = qmodel(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
    fxquant.save(qmodel, tmp_path / "saved", TOKENIZER)
    for graph in (qmodel, fxquant.load(tmp_path / "saved")):
        assert torch.equal(graph(**given), expected)
        assert torch.equal(graph(given["input_ids"], given["attention_mask"]), expected)
        with pytest.raises(TypeError, match="position_ids"):
            graph(input_ids=given["input_ids"], position_ids=given["input_ids"])
    for lists in (TOKENIZER(TEXTS[0]), {"input_ids": "text"}):
        with pytest.raises(FxquantError, match=r'as input_ids: .*return_tensors="pt"'):
            qmodel(**lists)
    with pytest.raises(FxquantError, match=r"list.*return_tensors"):
        qmodel(ROWS)
