"""Tables of results and the published figures beside ours, on results made by hand."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace

import pytest

from fxquant.errors import DataError
from fxquant.evaluation.datasets import NAMED
from fxquant.evaluation.fingerprint import depends_on_seed
from fxquant.evaluation.journal import Result
from fxquant.evaluation.protocol import Protocol
from fxquant.evaluation.provenance import Provenance
from fxquant.evaluation.published import (
    ALL,
    GPTQ_OF_THE_PAPER,
    LADDER,
    NAMED_MODELS,
    OPT,
    SMOOTH_LEVELS,
    Published,
)
from fxquant.evaluation.results import Row
from fxquant.evaluation.sweep_tables import FORMATS, format_results, groups
from fxquant.schemes.scheme import Scheme

GPTQ_W4 = f"w4-asym{GPTQ_OF_THE_PAPER}"
PROTOCOL = Protocol(
    dataset="wikitext2",
    split="test",
    join="\n\n",
    selection="all documents",
    tokenizer="slow GPT2Tokenizer",
    bos="</s> once, at the head of the stream",
    length=2048,
    stride=2048,
    windows=2,
    complete=True,
)
TOKENS = (2047, 2047)


def result(scheme: str, losses: tuple[float, float], **changes: object) -> Result:
    """A result whose two windows have these mean losses."""
    nll = tuple(loss * n for loss, n in zip(losses, TOKENS, strict=True))
    loss = sum(losses) / 2
    row = Row(scheme, loss, math.exp(loss), 0.0, None, 8.0, None, 1.0, 1.0, (), nll, TOKENS)
    made = Provenance(
        model="opt",
        revision="r",
        architecture=OPT["opt-1.3b"],
        dataset="wikitext2",
        text_hash="sha256:1",
        windows_hash="sha256:2",
        protocol=PROTOCOL,
        windows=2,
        length=2048,
        calibration="nothing",
        calibration_windows=0,
        batch_size=1,
        dtype="float16",
        device="cpu",
        seed=0,
        threads=1,
        versions={"torch": "2"},
        command="",
    )
    made = replace(made, **changes)  # type: ignore[arg-type]
    fingerprint = f"{scheme} {changes}"
    return Result(fingerprint, made.model, scheme, "wikitext2", 0, made.protocol, row, made)


FP = result("fp", (2.7, 2.6))


def test_seeds_are_averaged_window_by_window() -> None:
    runs = [
        FP,
        result("w8a8-static", (3.7, 3.0), seed=0),
        result("w8a8-static", (4.1, 3.2), seed=1, threads=7, command="again"),
    ]
    (group,) = groups(runs, ())
    fp, static = group.lines
    assert (fp.seeds, fp.spread) == (1, None)
    assert static.seeds == 2
    # Window means over seeds: 3.9 and 3.1; differences 1.2 and 0.5.
    assert static.loss == pytest.approx(3.5)
    assert static.difference is not None
    assert static.difference.delta == pytest.approx(0.85)
    assert static.difference.error == pytest.approx(0.35)  # sd 0.495 over sqrt(2)
    assert static.spread == pytest.approx(math.sqrt(2) * 0.15)  # losses 3.35 and 3.65
    assert "+0.8500 ± 0.3500" in format_results(runs)


def test_without_a_seed_there_is_one_figure() -> None:
    once = replace(result("w8", (2.8, 2.7)), seed=None)
    (group,) = groups([FP, once, replace(once, fingerprint="again")])
    assert [line.seeds for line in group.lines] == [1, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"revision": "s"},
        {"dtype": "float32"},
        {"batch_size": 2},
        {"calibration": "something"},
        {"protocol": replace(PROTOCOL, dataset="c4-old")},
        {"protocol": replace(PROTOCOL, tokenizer="fast GPT2TokenizerFast")},
        {"text_hash": "sha256:3"},
        {"architecture": "opt 4x128"},
        {"device": "cuda"},
        {"versions": {"torch": "3"}},
    ],
)
def test_what_does_not_compare_is_another_table(changes: dict[str, object]) -> None:
    runs = [FP, result("w8", (2.7, 2.6), **changes)]
    assert len(groups(runs)) == 2
    # In one csv of all groups, the columns in front tell them apart.
    first, second = csv.DictReader(io.StringIO(format_results(runs, "csv")))
    identity = list(first)[: list(first).index("scheme")]
    assert [first[name] for name in identity] != [second[name] for name in identity]


def test_published_perplexities_stand_beside_the_same_protocol_only() -> None:
    w4 = result(GPTQ_W4, (2.75, 2.75))
    (group,) = groups([FP, w4])
    line = group.lines[1]
    assert line.published is not None
    assert (line.published.perplexity, line.published.source) == (15.47, "GPTQ table 3")
    assert line.off == pytest.approx(math.exp(2.75) - 15.47)
    table = format_results([FP, w4])
    assert "| GPTQ W4 per row" in table
    assert f"{math.exp(2.75) - 15.47:+.4f}" in table
    for protocol in (
        replace(PROTOCOL, complete=False),
        replace(PROTOCOL, stride=512),
        replace(PROTOCOL, length=512, stride=512),
        replace(PROTOCOL, dataset="c4-new"),
    ):
        (group,) = groups([result(GPTQ_W4, (2.75, 2.75), protocol=protocol)])
        assert group.lines[0].published is None
    (group,) = groups([result(GPTQ_W4, (2.75, 2.75), architecture="opt 4x128")])
    assert group.lines[0].published is None


def test_another_calibration_than_the_published_is_said() -> None:
    ours = "16 windows of 512 from builtin (calibration topics, grid)"
    w4 = result(GPTQ_W4, (2.75, 2.75), calibration=ours)
    w3 = result(f"w3-asym{GPTQ_OF_THE_PAPER}", (3.1, 3.0), calibration=ours)
    said = (
        "GPTQ W4 per row, GPTQ W3 per row (GPTQ table 3): calibrated on 128 windows of 2048 tokens "
        f"of C4, ours on {ours}"
    )
    fp, rtn = (replace(result(s, (2.7, 2.6)), seed=None) for s in ("fp", "w4-asym"))
    assert format_results([fp, rtn, w4, w3]).splitlines()[-1] == said
    # Nothing to say of what is not calibrated, nor of the same windows.
    assert ": calibrated on" not in format_results([fp, rtn])
    for name in ("c4-old", "c4-new"):
        same = result(
            GPTQ_W4, (2.75, 2.75), calibration=f"128 windows of 2048 from {name} (train, documents)"
        )
        assert ": calibrated on" not in format_results([fp, same])
    more = result(GPTQ_W4, (2.75, 2.75), calibration="128 windows of 2048 from c4-newer (x)")
    assert ": calibrated on" in format_results([fp, more])
    # In csv it is a column.
    table = format_results([fp, w4], "csv")
    first, second = csv.DictReader(io.StringIO(table))
    assert first["published_calibration"] == ""
    assert second["published_calibration"] == "128 windows of 2048 tokens of C4"
    assert second["calibration"] == ours


def test_published_figures_say_what_they_were_calibrated_on() -> None:
    for figure in ALL:
        calibrated = figure.scheme is not None and depends_on_seed(Scheme.parse(figure.scheme))
        assert (figure.calibration is not None) == calibrated, figure


def test_the_two_c4_protocols_have_their_own_figures() -> None:
    for name, value in (
        ("c4-old", 14.72),
        ("c4-new", 16.07),
        ("ptb-old", 16.96),
        ("ptb-new", 20.29),
    ):
        (group,) = groups([result("fp", (2.7, 2.7), protocol=replace(PROTOCOL, dataset=name))])
        published = group.lines[0].published
        assert published is not None
        assert published.perplexity == value


def test_the_ladder_compares_differences_on_any_text() -> None:
    protocol = replace(PROTOCOL, dataset="builtin", complete=False)
    runs = [
        result("fp", (2.7, 2.6), protocol=protocol),
        result("w8a8-dynamic", (2.8, 2.7), protocol=protocol),
    ]
    (group,) = groups(runs, LADDER)
    line = group.lines[1]
    assert line.off == pytest.approx(0.1 - (3.422797 - 3.323711))
    table = format_results(runs, "github", LADDER, unmatched=True)
    assert "Δ +0.0991" in table
    # Published but not run by us: listed with ours empty.
    assert "W8A8 static p99.9" in table
    assert "Δ +3.0683" in table


def test_figures_of_formats_stand_beside_ours() -> None:
    fp8, int8 = "we4m3-tensor/ae4m3-static:absmax", "w8-tensor/a8-static:absmax"
    made = {"architecture": OPT["opt-13b"], "model": "facebook/opt-13b"}
    losses = {"fp": 2.3, fp8: 2.4, int8: 8.4}
    runs = [result(scheme, (loss, loss), **made) for scheme, loss in losses.items()]
    (group,) = groups(runs)
    published = [line.published for line in group.lines if line.published]
    assert [each.perplexity for each in published] == [10.12, 10.24, 4135.99]
    assert "| FP8 W8A8 per tensor" in format_results(runs)


@pytest.mark.parametrize(("model", "expected"), [("Llama-2-7b-hf", 5.47), ("Llama-3.1-8B", None)])
def test_models_of_one_shape_are_told_apart_by_name(model: str, expected: float | None) -> None:
    run = result("fp", (1.7, 1.7), architecture="llama 32x4096", model=f"meta-llama/{model}")
    (group,) = groups([run])
    published = group.lines[0].published
    assert (published and published.perplexity) == expected


def test_published_rows_are_well_formed() -> None:
    for figure in ALL:
        if figure.scheme is not None:
            scheme = Scheme.parse(figure.scheme)
            assert Scheme.parse(str(scheme)) == scheme
        assert figure.architecture in {**OPT, **NAMED_MODELS}.values()
        assert figure.architecture == NAMED_MODELS.get(figure.named, figure.architecture)
        assert (figure.dataset is None) == (figure.delta_loss is not None)
        if figure.dataset is not None:
            known = tuple(NAMED) if figure.architecture != OPT["opt-175b"] else (figure.dataset,)
            assert figure.dataset in known
            assert figure.perplexity is not None
    places = [(f.architecture, f.named, f.dataset, f.method, f.source) for f in ALL]
    assert len(set(places)) == len(places)


def test_published_numbers_as_printed_in_the_sources() -> None:
    def find(size: str, scheme: str | None, dataset: str | None = "wikitext2") -> list[Published]:
        same = [f for f in ALL if f.architecture == OPT[size] and f.dataset == dataset]
        return [f for f in same if f.scheme == scheme]

    assert [f.perplexity for f in find("opt-125m", f"w3-asym{GPTQ_OF_THE_PAPER}")] == [53.85]
    assert [f.perplexity for f in find("opt-350m", "w4-asym")] == [25.94]
    assert find("opt-350m", "w4-g128-asym") == []
    assert sorted(f.perplexity or 0 for f in find("opt-1.3b", None)) == [14.88, 15.04]
    assert [f.perplexity for f in find("opt-6.7b", SMOOTH_LEVELS["O3"])] == [10.85]
    (static,) = find("opt-1.3b", "w8a8-static", None)
    assert static.delta_loss == pytest.approx(3.068271)


def test_formats() -> None:
    runs = [FP, result("w8", (2.71, 2.62))]
    for style in FORMATS:
        text = format_results(runs, style)
        assert "w8" in text
        if style not in ("csv", "tsv"):
            assert "0.0150" in text
    with pytest.raises(DataError, match=r"unknown format 'word': known are csv, .*latex"):
        format_results(runs, "word")


def test_csv_has_full_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(format_results([FP, result("w8", (2.7, 2.7))], "csv"))))
    assert [row["scheme"] for row in rows] == ["fp", "w8"]
    assert float(rows[1]["delta_loss"]) == pytest.approx(0.05, abs=1e-12)
    assert float(rows[1]["delta_error"]) == pytest.approx(0.05, abs=1e-12)
    assert rows[1]["dataset"] == "wikitext2"
    uncounted = result("w8", (2.7, 2.7))
    assert uncounted.figures is not None
    uncounted = replace(uncounted, figures=replace(uncounted.figures, bits_per_weight=math.nan))
    _, row = csv.DictReader(io.StringIO(format_results([FP, uncounted], "csv")))
    assert row["bits_per_weight"] == ""  # an engine's: nothing is not a number


def test_a_failure_done_since_is_not_listed() -> None:
    failed = Result("x", "opt", "w8", "wikitext2", 0, error="gone")
    other = Result("y", "opt", "w4", "wikitext2", 0, error="gone")
    third = Result("z", "opt", "w3", "wikitext2", None, error="gone")
    table = format_results([FP, failed, other, third, result("w8", (2.7, 2.6))])
    assert "failed: opt on wikitext2, w4 (seed 0), w3: gone" in table
    assert table.count("failed") == 1
