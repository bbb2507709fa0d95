"""Named datasets under the papers' protocols: windows by hand, GPTQ's own code beside ours."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import fxquant
from fxquant.cli.main import main
from fxquant.errors import DataError
from fxquant.evaluation import Job, cut_windows
from fxquant.evaluation.data import load_text
from fxquant.evaluation.datasets import NAMED, open_source, tokenizer_note
from fxquant.evaluation.job import cut as cut_job
from fxquant.evaluation.models import LoadedModel
from fxquant.evaluation.perplexity import evaluate
from fxquant.evaluation.token_windows import Windows
from tests.architectures import opt
from tests.environments import by_version
from tests.hub_format import (
    ALPHABET,
    character_tokenizer,
    ids_of,
    write_c4,
    write_parquet,
    write_ptb,
    write_wikitext,
)
from tests.models import SMALL_OPT

TOKENIZER = character_tokenizer()


def words(seed: int, lengths: list[int]) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(ALPHABET[2:], k=n)) for n in lengths]


LENGTHS = [5, 30, 9, 41, 12, 8, 77, 10]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    write_wikitext(root, {"test": ["ab", "", "c"], "train": words(1, [60, 0, 50])})
    write_c4(root, {"validation": words(2, LENGTHS * 2), "train": words(3, LENGTHS * 3)})
    write_ptb(
        root,
        {"validation": ["ab", "c"], "test": ["de", "f"], "train": words(4, [40, 40])},
    )
    return root


def cut(name: str, data: Path, **changes: Any) -> Windows:
    options: dict[str, Any] = {"count": None, "length": 4, "calibration": 0, "seed": 0}
    return cut_windows(open_source(name, data), TOKENIZER, **{**options, **changes})


# --- windows computed by hand ---------------------------------------------------------------------


def test_wikitext2_is_one_stream_joined_by_blank_lines(data: Path) -> None:
    # <s> a b \n | \n \n \n c : eight tokens, two windows, no tail.
    found = cut("wikitext2", data)
    assert found.evaluation.tolist() == [[0, 3, 4, 1], [1, 1, 1, 5]]
    assert found.scored.tolist() == [3, 3]
    protocol = found.protocol
    assert (protocol.join, protocol.tail, protocol.complete) == ("\n\n", "dropped", True)
    assert protocol.bos == "<s> once, at the head of the stream"
    assert protocol.tokenizer == by_version(
        "fast PreTrainedTokenizerFast", "fast TokenizersBackend"
    )
    # The tail of three tokens is dropped at a window of five.
    assert cut("wikitext2", data, length=5).evaluation.tolist() == [[0, 3, 4, 1, 1]]


def test_ptb_old_and_new_differ_in_split_and_join(data: Path) -> None:
    old, new = cut("ptb-old", data), cut("ptb-new", data)
    assert old.evaluation.tolist() == [[0, 3, 4, 1]]  # <s> a b \n | \n c
    assert new.evaluation.tolist() == [[0, 6, 7, 2]]  # <s> d e ' ' | f
    assert old.protocol != new.protocol


def test_c4_new_is_the_first_documents_joined_by_spaces(data: Path) -> None:
    texts = words(2, LENGTHS * 2)
    stream = ids_of(" ".join(texts))
    found = cut("c4-new", data)
    assert found.evaluation.flatten().tolist() == stream[: len(stream) // 4 * 4]
    assert len(found.evaluation) == len(stream) // 4 < 256


def test_c4_new_reads_1100_documents_and_at_most_256_windows(tmp_path: Path) -> None:
    texts = words(5, [3] * 1200)
    write_c4(tmp_path, {"validation": texts, "train": ["x"]})
    kept = ids_of(" ".join(texts[:1100]))
    windows = cut("c4-new", tmp_path, length=20).evaluation
    assert windows.flatten().tolist() == kept[: len(kept) // 20 * 20]
    short = cut("c4-new", tmp_path, length=16)
    assert short.evaluation.flatten().tolist() == kept[: 256 * 16]
    assert short.protocol.complete


# --- GPTQ's code, as it stands in datautils.py and opt.py, beside ours ----------------------------


def gptq_c4(texts: list[str], count: int, length: int, seed: int) -> Tensor:
    """valenc and trainloader of get_c4: the same loop."""
    random.seed(seed)
    rows = []
    for _ in range(count):
        while True:
            i = random.randint(0, len(texts) - 1)
            encoded = TOKENIZER(texts[i], return_tensors="pt").input_ids
            if encoded.shape[1] > length:
                break
        i = random.randint(0, encoded.shape[1] - length - 1)
        rows.append(encoded[:, i : i + length])
    return torch.vstack(rows)


@pytest.fixture
def kept_random_state() -> Iterator[None]:
    state = random.getstate()
    yield
    random.setstate(state)


@pytest.mark.usefixtures("kept_random_state")
@pytest.mark.parametrize("length", [7, 12])
def test_c4_old_draws_what_gptq_draws(data: Path, length: int) -> None:
    found = cut("c4-old", data, length=length, calibration=6, seed=3)
    expected = gptq_c4(words(2, LENGTHS * 2), 256, length, 0)
    assert torch.equal(found.evaluation, expected)
    assert torch.equal(found.calibration, gptq_c4(words(3, LENGTHS * 3), 6, length, 3))
    assert len(found.evaluation) == 256
    assert found.scored.tolist() == [length - 1] * 256
    few = cut("c4-old", data, length=length, count=5)
    assert torch.equal(few.evaluation, expected[:5])
    assert not few.protocol.complete


@pytest.mark.usefixtures("kept_random_state")
def test_wikitext2_calibration_draws_what_gptq_draws(data: Path) -> None:
    train = torch.tensor(ids_of("\n\n".join(words(1, [60, 0, 50]))))
    random.seed(7)
    rows = []
    for _ in range(9):
        i = random.randint(0, len(train) - 10 - 1)
        rows.append(train[i : i + 10])
    found = cut("wikitext2", data, calibration=9, calibration_length=10, seed=7)
    assert torch.equal(found.calibration, torch.stack(rows))


@torch.no_grad()
def gptq_perplexity(model: nn.Module, stream: list[int], seqlen: int) -> float:
    """opt_eval: exp of the windows' mean losses, weighted by seqlen over nsamples * seqlen."""
    ids, nlls = torch.tensor(stream)[None], []
    nsamples = ids.numel() // seqlen
    for i in range(nsamples):
        batch = ids[:, i * seqlen : (i + 1) * seqlen]
        logits = model(input_ids=batch, use_cache=False).logits.double()
        loss = nn.CrossEntropyLoss()(logits[0, :-1], batch[0, 1:])
        nlls.append(loss * seqlen)
    return math.exp(float(torch.stack(nlls).sum()) / (nsamples * seqlen))


@pytest.mark.parametrize("name", ["wikitext2", "c4-new"])
def test_perplexity_is_that_of_gptqs_opt_eval(tmp_path: Path, name: str) -> None:
    texts = words(6, [40, 0, 33, 58])
    write_wikitext(tmp_path, {"test": texts, "train": ["x"]})
    write_c4(tmp_path, {"validation": texts, "train": ["x"]})
    model = opt()
    found = cut(name, tmp_path, length=32)
    ours = evaluate(fxquant.trace(model), found.evaluation, scored=found.scored)
    stream = ids_of({"wikitext2": "\n\n", "c4-new": " "}[name].join(texts))
    # fp32 losses of about 8 nats: the mean is good to a few eps of that.
    assert ours.perplexity == pytest.approx(gptq_perplexity(model, stream, 32), rel=1e-5)


# --- overlapping windows --------------------------------------------------------------------------


@torch.no_grad()
def sliding_loss(model: nn.Module, stream: list[int], length: int, stride: int) -> float:
    """Hugging Face's recipe ("Perplexity of fixed-length models") over full windows: labels before
    the new tokens are -100; each scored token weighs the same."""
    ids, total, count, previous = torch.tensor(stream)[None], 0.0, 0, 0
    for begin in range(0, len(stream) - length + 1, stride):
        end = begin + length
        batch, labels = ids[:, begin:end], ids[:, begin:end].clone()
        labels[:, : length - (end - previous)] = -100
        logits = model(input_ids=batch, use_cache=False).logits.double()
        shifted = labels[0, 1:]
        total += float(nn.CrossEntropyLoss(reduction="sum")(logits[0, :-1], shifted))
        count += int((shifted != -100).sum())
        previous = end
    return total / count


@pytest.mark.parametrize("stride", [1, 7, 16, 31, 32])
def test_stride_is_the_hugging_face_recipe(data: Path, stride: int) -> None:
    model = opt()
    found = cut("c4-new", data, length=32, stride=stride, count=5)
    ours = evaluate(fxquant.trace(model), found.evaluation, scored=found.scored, batch_size=2)
    stream = ids_of(" ".join(words(2, LENGTHS * 2)))[: 4 * stride + 32]
    assert ours.loss == pytest.approx(sliding_loss(model, stream, 32, stride), rel=1e-5)
    assert sum(ours.sums.tokens) == 31 + 4 * min(stride, 31)
    assert found.protocol.stride == stride


def test_stride_of_a_window_is_no_overlap(data: Path) -> None:
    plain, strided = cut("c4-new", data), cut("c4-new", data, stride=4)
    assert torch.equal(plain.evaluation, strided.evaluation)
    assert torch.equal(plain.scored, strided.scored)
    assert plain.protocol == strided.protocol


def test_samples_take_no_stride(data: Path) -> None:
    with pytest.raises(DataError, match="256 separate samples: it takes no stride"):
        cut("c4-old", data, stride=2)


# --- local datasets -------------------------------------------------------------------------------


def test_parquet_and_saved_folders(tmp_path: Path) -> None:
    texts = words(8, [30, 30])
    write_parquet(tmp_path / "one.parquet", "content", texts)
    rows = datasets.Dataset.from_dict({"text": texts})
    rows.save_to_disk(tmp_path / "single")
    other = datasets.Dataset.from_dict({"text": words(9, [50])})
    datasets.DatasetDict({"train": other, "test": rows}).save_to_disk(tmp_path / "splits")
    expected = ids_of("\n\n".join(texts))
    for name in ("one.parquet", "single", "splits"):
        source = open_source(str(tmp_path / name))
        found = cut_windows(source, TOKENIZER, count=3, length=8, calibration=2, seed=0)
        assert found.evaluation.flatten().tolist() == expected[:24], name
        assert found.protocol.dataset == name
    assert open_source(str(tmp_path / "splits")).calibration == words(9, [50])[0]


def test_a_table_without_text_lists_its_columns(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"two needs a column 'text'.*it has a, b"):
        open_source(str(tmp_path / "two"))


@pytest.mark.parametrize("name", ["bad.parquet", "folder"])
def test_damaged_local_data(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=name):
        open_source(str(tmp_path / name))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), RuntimeError("scripts"), KeyError("x"), ValueError("")]
)
@pytest.mark.parametrize("name", sorted(NAMED))
def test_whatever_the_loader_raises_is_one_error(
    monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", failing)
    with pytest.raises(DataError, match=f"cannot load {name}.*{type(error).__name__}.*hf download"):
        open_source(name)


@pytest.mark.parametrize("name", ["c4", "ptb"])
def test_ambiguous_names_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"say {name}-old .* or {name}-new"):
        open_source(name)


def test_documents_that_are_all_short(data: Path) -> None:
    with pytest.raises(DataError, match="no document of more than 100 tokens"):
        cut("c4-old", data, length=100)


def test_all_windows_leave_none_to_calibrate_on(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc" * 40)
    with pytest.raises(DataError, match="leaves none to calibrate on"):
        cut(str(text), tmp_path, calibration=1)
    assert len(cut(str(text), tmp_path).evaluation) == 121 // 4


def test_calibration_on_another_dataset(data: Path) -> None:
    train = torch.tensor(ids_of("\n\n".join(words(4, [40, 40]))))
    other = open_source("ptb-new", data)
    found = cut("wikitext2", data, calibration=3, calibration_source=other)
    joined = torch.tensor(ids_of(" ".join(words(4, [40, 40]))))
    assert len(joined) == len(train) - 1
    places = {tuple(row.tolist()) for row in joined.unfold(0, 4, 1)}
    assert all(tuple(row) in places for row in found.calibration.tolist())
    assert found.evaluation.tolist() == cut("wikitext2", data).evaluation.tolist()


# --- caches and tokenizers ------------------------------------------------------------------------


def test_a_filled_cache_serves_offline(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = str(data / "Salesforce" / "wikitext")
    datasets.load_dataset(clone, "wikitext-2-raw-v1")
    (tmp_path / "cache" / "wikitext").rename(tmp_path / "cache" / "Salesforce___wikitext")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_source("wikitext2").evaluation == "ab\n\n\n\nc"
    with pytest.raises(DataError, match=r"cannot load c4-new.*[Oo]ffline.*hf download.*allenai/c4"):
        open_source("c4-new")


def write_slow_tokenizer(folder: Path) -> None:
    """A GPT-2 tokenizer's files, as OPT's repositories have them: one token a character."""
    letters = ["Ġ", "Ċ", *ALPHABET[2:]]
    special = {"<unk>": 0, "<pad>": 1, "</s>": 2}
    vocabulary = {**special, **{letter: 3 + i for i, letter in enumerate(letters)}}
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        **{f"{name}_token": "</s>" for name in ("bos", "eos", "unk", "pad")},
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_the_papers_protocols_use_the_slow_tokenizer(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_slow_tokenizer(folder)
    fast = AutoTokenizer.from_pretrained(folder)
    assert fast.is_fast
    found = cut_windows(
        open_source("wikitext2", data), fast, count=None, length=4, calibration=0, seed=0
    )
    # transformers 5 has one class for both, on the fast library.
    assert found.protocol.tokenizer == by_version("slow GPT2Tokenizer", "fast GPT2Tokenizer")
    assert found.protocol.bos == "</s> once, at the head of the stream"
    # </s> a b \n | \n \n \n c
    assert found.evaluation.tolist() == [[2, 5, 6, 4], [4, 4, 4, 7]]
    parquet = tmp_path / "x.parquet"
    write_parquet(parquet, "text", ["ab", "c"])
    local = cut_windows(
        open_source(str(parquet)), fast, count=None, length=4, calibration=0, seed=0
    )
    assert local.protocol.tokenizer == by_version("fast GPT2TokenizerFast", "fast GPT2Tokenizer")


def test_the_slow_tokenizer_is_of_the_same_revision(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_slow_tokenizer(tmp_path)
    fast, asked = AutoTokenizer.from_pretrained(tmp_path), []

    def from_pretrained(name: str, **options: object) -> object:
        asked.append((name, options))
        return fast

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    model = LoadedModel(torch.nn.Module(), fast, "model", "r", None)
    job = Job("model", (), "wikitext2", windows=1, length=4, calibration_windows=0, revision="v1")
    windows = cut_job(job, open_source("wikitext2", data), None, model)
    assert [name for name, _ in asked] == [str(tmp_path)]
    options = {"use_fast": False, "revision": "v1", "trust_remote_code": False}
    assert options.items() <= asked[0][1].items()
    # It was fast all the same, and that is said.
    assert tokenizer_note("model", windows.protocol).startswith("model has no slow tokenizer")
    assert tokenizer_note("model", replace(windows.protocol, tokenizer="slow X")) == ""
    assert tokenizer_note("model", replace(windows.protocol, dataset="x.txt")) == ""


def test_evaluate_and_sweep_say_that_the_tokenizer_is_fast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the table, not only within the protocol's line."""
    write_wikitext(tmp_path, {"test": ["some words"] * 40, "train": ["other words"] * 40})
    options = ["--model", str(SMALL_OPT), "--data", str(tmp_path), "--dataset", "wikitext2"]
    options += ["--windows", "1", "--length", "16", "--calibration-windows", "0"]
    assert main(["evaluate", *options, "--schemes", "w8"]) == 0
    said = "has no slow tokenizer, which the papers used: wikitext2 was cut by its fast one"
    assert f"\n{SMALL_OPT} {said}\n" in capsys.readouterr().out
    file = tmp_path / "s.toml"
    file.write_text(
        f'models = ["{SMALL_OPT}"]\nschemes = ["fp"]\ndatasets = ["wikitext2"]\nwindows = 1\n'
        f'length = 16\ncalibration_windows = 0\ndata = "{tmp_path}"\n'
    )
    assert main(["sweep", str(file), "--output", str(tmp_path / "out")]) == 0
    assert f"\n{SMALL_OPT} {said}\n" in capsys.readouterr().out


def test_a_tokenizer_without_bos(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some letters and spaces")
    plain = character_tokenizer(bos=False)
    found = cut_windows(load_text(str(text)), plain, count=1, length=8, calibration=0, seed=0)
    assert found.protocol.bos == "none"
    assert "BOS: none; the first 1 windows of 8 tokens, side by side" in found.protocol.line()
