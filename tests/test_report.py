"""The report without a browser: what is read, what is refused, what the HTML holds."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import statistics
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fxquant
from fxquant.cli.main import main
from fxquant.errors import DataError
from fxquant.evaluation.journal import read_journal
from fxquant.evaluation.report import write_report
from fxquant.evaluation.report.fields import Fields
from fxquant.evaluation.report.folder import read_folder
from fxquant.evaluation.report.inspection import read_inspection
from fxquant.evaluation.report.ladder import ladders
from fxquant.evaluation.report.page import PAGE, chart_data, embeddable, read_report, render
from fxquant.evaluation.report.tables import table_of, text_of
from fxquant.evaluation.results import read_results
from fxquant.evaluation.sweep_tables import groups
from fxquant.evaluation.tables import format_table
from fxquant.ir.calibration import calibration_words
from fxquant.ir.graph import info
from tests.architectures import llama, token_ids
from tests.report_folder import GROUPS, HOSTILE, LADDER, sites, sweep, write_folder

VOID = {"meta", "link", "input", "img", "br", "hr"}


class Page(HTMLParser):
    """Every start tag with its attributes; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    def text(self, *tags: str) -> str:
        return " ".join(data for tag, data in self.texts if tag in tags)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def html(full: Path) -> str:
    return render(read_report(full))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_nothing_is_loaded_from_elsewhere(html: str, page: Page) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name, "")
            assert value == "" or value.startswith(("#", "data:")), f"<{tag} {name}={value[:60]}>"
    assert not re.search(r"@import|url\((?!data:)", page.text("style"))
    (policy,) = [a["content"] for _, a in page.tags if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    assert "<base" not in html


def test_what_came_from_files_is_escaped(html: str, page: Page) -> None:
    assert HOSTILE not in html
    assert not any(tag == "img" for tag, _ in page.tags)
    # It is there nevertheless: as a failed cell, as a token, in a diff and in the charts' data.
    assert HOSTILE in page.text("span")
    assert HOSTILE.replace(" ", "␣") in page.text("bdi")
    assert f"+q = {HOSTILE}" in page.text("span")


def test_data_survive_embedding(full: Path, page: Page) -> None:
    (embedded,) = [data for tag, data in page.texts if tag == "script" and data.startswith("{")]
    expected = json.loads(json.dumps(chart_data(read_report(full))))
    assert json.loads(embedded) == expected
    assert len(expected["explanations"][0]["cells"]) == len(sites())


plain = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from([HOSTILE, "<!--", "&"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_embedded_json_is_strict_and_cannot_end_its_element(value: Any) -> None:
    def finite(item: Any) -> Any:
        if isinstance(item, float):
            return item if math.isfinite(item) else None
        if isinstance(item, dict):
            return {key: finite(inner) for key, inner in item.items()}
        return [finite(inner) for inner in item] if isinstance(item, list) else item

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = embeddable(value)
    assert not set("<>&") & set(text)
    assert json.loads(text, parse_constant=refuse) == finite(value)


def test_ids_are_unique_and_references_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        for name in ("aria-controls", "aria-labelledby"):
            if name in attributes:
                assert attributes[name] in ids, f"<{tag} {name}={attributes[name]}>"
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids


def test_controls_are_buttons_and_charts_have_words(page: Page) -> None:
    charts = [attributes for _, attributes in page.tags if "data-chart" in attributes]
    assert {a["data-chart"] for a in charts} == {
        "ladder",
        "causes",
        "recovery",
        "heatmap",
        "histogram",
    }
    assert all(a["aria-label"] for a in charts)
    for tag, attributes in page.tags:
        assert "onclick" not in attributes
        if attributes.get("role") == "tab":
            assert tag == "button"


def test_every_scheme_and_site_is_in_a_table(page: Page) -> None:
    codes, cells = page.text("code").split(), page.text("bdi").split()
    assert set(LADDER) <= set(codes)
    assert {path for path, _, _ in sites()} <= set(cells)


def test_the_same_folder_gives_the_same_page(full: Path, html: str) -> None:
    assert render(read_report(full)) == html


def test_vendored_files_are_those_their_readme_names() -> None:
    table = (PAGE / "vendor" / "README.md").read_text()
    named = dict(re.findall(r"^\| `([^`]+)` .*`([0-9a-f]{64})` \|$", table, re.MULTILINE))
    files = {p.name for p in (PAGE / "vendor").iterdir() if p.suffix in (".js", ".woff2")}
    assert set(named) == files
    for name, digest in named.items():
        assert hashlib.sha256((PAGE / "vendor" / name).read_bytes()).hexdigest() == digest


# The ladder: what is averaged, and over what.


def journal(folder: Path, lines: list[dict[str, Any]]) -> Path:
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_ladder_is_the_table(tmp_path: Path) -> None:
    """Every figure is the one that ``fxquant table`` prints of the same file."""
    folder = journal(tmp_path, sweep(random.Random(3)))
    tables = groups(read_journal(folder / "results.jsonl"), ())
    found = ladders(read_folder(folder))
    assert [ladder.title for ladder in found] == [
        "package:example · builtin",
        "package:other · builtin",
    ]
    for ladder, group in zip(found, tables, strict=True):
        finished = [rung for rung in ladder.rungs if rung.error is None]
        assert [rung.line for rung in finished] == list(group.lines)
        for rung, line in zip(finished, group.lines, strict=True):
            assert line.difference is not None
            assert rung.delta_loss == line.difference.delta
            if rung.scheme != "fp":
                assert rung.standard_error == line.difference.error
    assert dict(found[0].provenance)["seed"] == "0, 1, 2"
    failed = found[1].rungs[-1]
    assert failed.scheme == "w3-g128"
    assert failed.error is not None
    assert HOSTILE in failed.error


def test_seeds_are_averaged_before_their_difference(tmp_path: Path) -> None:
    """± is of the mean over seeds: what changes sign from seed to seed cancels."""
    lines = sweep(random.Random(3))
    first, _ = ladders(read_folder(journal(tmp_path, lines)))
    for rung in first.rungs:
        cells = [c for c in lines if (c["model"], c["scheme"]) == ("package:example", rung.scheme)]
        rows = [cell["figures"] for cell in cells]
        assert rung.line.seeds == len(rows) == (3 if "static" in rung.scheme else 1)
        if len(rows) == 1:
            continue
        float_model = lines[0]["figures"]["window_nll"]
        means = [statistics.fmean(w) for w in zip(*(r["window_nll"] for r in rows), strict=True)]
        changes = [(a - b) / 511 for a, b in zip(means, float_model, strict=True)]
        assert rung.delta_loss == pytest.approx(statistics.fmean(changes))
        assert rung.standard_error == pytest.approx(statistics.stdev(changes) / 8**0.5)
        assert rung.line.spread == pytest.approx(statistics.stdev(row["loss"] for row in rows))


def test_a_cell_that_was_done_again_counts_once(tmp_path: Path) -> None:
    lines = sweep(random.Random(3))
    again = json.loads(json.dumps(lines[1]))
    again["figures"]["delta_loss"] = 0.5
    first, _ = ladders(read_folder(journal(tmp_path, [*lines, again])))
    (rung,) = [rung for rung in first.rungs if rung.scheme == again["scheme"]]
    assert [row.delta_loss for row in rung.rows] == [0.5]


def test_a_seed_that_failed_is_named_beside_those_that_did_not(tmp_path: Path) -> None:
    lines = sweep(random.Random(3))
    lost = next(c for c in lines if c["scheme"] == "w8a8-static" and c["seed"] == 1)
    lost |= {"figures": None, "provenance": None, "protocol": None, "error": "killed"}
    first, _ = ladders(read_folder(journal(tmp_path, lines)))
    (rung,) = [rung for rung in first.rungs if rung.scheme == "w8a8-static"]
    assert rung.line.seeds == 2
    assert (first.rungs[-1].scheme, first.rungs[-1].error) == ("w8a8-static (seed 1)", "killed")


def test_what_stays_float_is_listed_by_scheme(full: Path) -> None:
    first = ladders(read_folder(full))[0]
    ((schemes, lines),) = first.left_in_float
    assert schemes == ", ".join(LADDER)
    assert lines[0].startswith("lm_head")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("length", 2048),
        ("text_hash", "sha256:other"),
        ("versions", {"fxquant": "0.2.0"}),
        ("dtype", "float16"),
    ],
)
def test_settings_are_not_mixed(tmp_path: Path, name: str, value: Any) -> None:
    lines = sweep(random.Random(3))
    other = json.loads(json.dumps(lines[1]))
    other["fingerprint"] = "other"
    other["provenance"][name] = value
    found = ladders(read_folder(journal(tmp_path, [*lines, other])))
    # The other setting's stands alone, without a float model to compare with.
    assert [len(ladder.rungs) for ladder in found] == [len(LADDER), len(LADDER) + 1, 1]
    assert found[2].rungs[0].delta_loss is None
    assert len({ladder.title for ladder in found}) == 3


def test_each_calibration_has_the_float_model(tmp_path: Path) -> None:
    """What depends on no calibration is compared with the results of either."""
    lines = sweep(random.Random(3))
    other = json.loads(json.dumps(next(line for line in lines if line["scheme"] == "w8a8-static")))
    other["fingerprint"] = "other"
    other["provenance"]["calibration"] = "16 windows of 512 from elsewhere (train, offsets)"
    found = ladders(read_folder(journal(tmp_path, [*lines, other])))
    uncalibrated = [scheme for scheme in LADDER if "static" not in scheme]
    assert [rung.scheme for rung in found[1].rungs] == [*uncalibrated, "w8a8-static"]
    assert all(rung.delta_loss is not None for rung in found[1].rungs)
    assert [len(ladder.rungs) for ladder in found] == [
        len(LADDER),
        len(uncalibrated) + 1,
        len(LADDER) + 1,
    ]
    shown = [dict(ladder.provenance)["calibration"] for ladder in found]
    assert ["elsewhere" in text for text in shown] == [False, True, False]


def test_a_saved_graph_has_no_difference(tmp_path: Path) -> None:
    """Its one row has no float model beside it: JSON has no word for that Δloss."""
    write_folder(tmp_path)
    data = json.loads((tmp_path / "results.json").read_text())
    data["rows"] = [{**data["rows"][1], "delta_loss": None, "delta_error": None}]
    (tmp_path / "results.json").write_text(json.dumps(data))
    (row,), _ = read_results(tmp_path / "results.json")
    assert math.isnan(row.delta_loss)
    assert format_table([row]).splitlines()[-1].split("|")[4].strip() == "-"
    report = read_report(tmp_path)
    assert report.ladders[0].rungs[0].delta_loss is None
    assert "w8" in Page(render(report)).text("code")


# What is missing, unfinished or damaged.


def test_missing_parts_are_listed_with_their_command(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for name in ("explanation.json", "inspect.json", "results.jsonl"):
        (tmp_path / name).unlink()
    report = read_report(tmp_path)
    sections = [part.section for part in report.missing]
    assert sections == ["seeds", "explanation", "activations", "passes"]
    text = Page(render(report)).text("p", "code")
    assert text.count("Not in this folder") == 3
    for command in ("fxquant sweep", "fxquant explain", "fxquant inspect"):
        assert command in text


def test_an_inspection_says_what_its_graph_was_calibrated_on() -> None:
    ids = token_ids(2, 12)
    for scheme in ("w8a8-static:absmax", "w8"):
        graph = fxquant.convert(llama(), scheme, calibration=[ids])
        data = json.loads(json.dumps(fxquant.inspect(graph).to_dict()))
        header = dict(read_inspection(Fields.of(Path("inspect.json"), "", data)).header)
        assert header["calibrated on"] == calibration_words(info(graph).calibration)
        assert (header["calibrated on"] == "nothing") is (scheme == "w8")
    data["calibration"] = [{"tokens": "many"}]
    with pytest.raises(DataError, match=r"inspect\.json.*calibration"):
        read_inspection(Fields.of(Path("inspect.json"), "", data))


def test_a_history_without_diffs_says_so(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = json.loads((tmp_path / "inspect.json").read_text())
    for row in data["history"]:
        del row["diff"]
    (tmp_path / "inspect.json").write_text(json.dumps(data))
    assert [part.section for part in read_report(tmp_path).missing] == ["diffs"]


def test_a_full_folder_misses_nothing(full: Path) -> None:
    assert read_report(full).missing == ()


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**data, "complete": False}))
    assert "interrupted" in Page(render(read_report(tmp_path))).text("p")


def test_an_unfinished_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = tmp_path / "results.jsonl"
    before = len(read_folder(tmp_path).sweep)
    path.write_text(path.read_text() + '{"format": 1, "finge')
    folder = read_folder(tmp_path)
    assert len(folder.sweep) == before
    assert "last line is unfinished" in Page(render(read_report(tmp_path))).text("span")


def put(*keys: str | int, value: Any) -> Callable[[Any], None]:
    """Set the value at a place of a JSON document."""

    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("results.json", put("rows", value={}), "rows: expected a list"),
        ("results.json", put("rows", 1, "scheme", value=3), "rows[1].scheme: expected"),
        ("results.json", put("rows", 1, "loss", value="low"), "rows[1].loss: expected"),
        ("results.json", put("provenance", value=None), "provenance: expected an object"),
        (
            "explanation.json",
            put("delta_loss", value=None),
            "a number at delta_loss, found nothing",
        ),
        ("explanation.json", put("sites", 2, "site", value=None), "text at sites[2].site"),
        ("explanation.json", put("kinds", value={"fc1": 1}), "a list at kinds"),
        ("inspect.json", put("scheme", value=None), "text at scheme"),
        ("inspect.json", put("history", 0, "name", value=None), "text at history[0].name"),
        (
            "inspect.json",
            put("sites", 0, "records", 0, "seen_low", value=99.0),
            "between seen_low and seen_high",
        ),
        (
            "inspect.json",
            put("sites", 0, "records", 0, "histogram", value=["many"]),
            "finite counts",
        ),
        (
            "results.jsonl",
            put("model", value=None),
            "line 1 is no result of this version (model: ",
        ),
    ],
)
def test_a_wrong_format_is_one_error_that_names_file_and_place(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    change: Callable[[Any], None],
    words: str,
) -> None:
    write_folder(tmp_path)
    text = (tmp_path / name).read_text()
    if name.endswith("l"):
        text, _, rest = text.partition("\n")
    else:
        rest = ""
    data = json.loads(text)
    change(data)
    (tmp_path / name).write_text(f"{json.dumps(data)}\n{rest}")
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / name) in error
    assert words in error
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "name", ["results.json", "results.jsonl", "explanation.json", "inspect.json"]
)
@pytest.mark.parametrize("content", [b"{\n", b"[1]\n", b"\xff\xfe\n", b"null\n"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    write_folder(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(name)):
        read_report(tmp_path)


def test_no_folder_no_results_no_place_to_write(tmp_path: Path, full: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        read_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no results\.json.*fxquant evaluate"):
        read_report(tmp_path)
    with pytest.raises(DataError, match="cannot write the report to"):
        write_report(full, tmp_path / "nowhere" / "report.html")


def test_without_jinja2_the_error_says_what_to_install(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(DataError, match=r"fxquant\[report\]"):
        write_report(full, tmp_path / "report.html")


def test_the_command_says_where_and_from_what(
    full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    assert main(["report", str(full), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert str(output) in said
    assert "results.json, results.jsonl, explanation.json, inspect.json" in said
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [output]


# Values as text.


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (3.82816, "nats", "+3.8282"),
        (-0.0015, "nats", "\N{MINUS SIGN}0.0015"),
        (-2.71e-5, "nats", "\N{MINUS SIGN}2.7e\N{MINUS SIGN}5"),
        (0.0, "nats", "+0.0000"),
        (0.002416, "share", "0.2416%"),
        (0.25, "share", "25.00%"),
        (31.26, "decibel", "31.3 dB"),
        (8.049, "bits", "8.05"),
        (134515008.0, "number", "134,515,008"),
        (math.nan, "nats", "NaN"),
        (-math.inf, "loss", "\N{MINUS SIGN}∞"),
        (None, "loss", "\N{EN DASH}"),
    ],
)
def test_text_of_values(value: float | None, unit: Any, expected: str) -> None:
    assert text_of(value, unit) == expected


def test_records_become_one_table() -> None:
    table = table_of([{"site": "a", "sums": {"in_order": 1.0}}, {"site": "b", "shape": [2, 3]}])
    assert [column.label for column in table.columns] == ["site", "in order Δ", "shape"]
    assert table.rows == (("a", 1.0, None), ("b", None, "2, 3"))


def test_fields_name_the_place() -> None:
    fields = Fields(Path("x.json"), "rows[3]", {"loss": True})
    with pytest.raises(
        DataError, match=r"x\.json: expected a number at rows\[3\]\.loss, found bool"
    ):
        fields.number("loss")


def test_kinds_keep_their_order(full: Path) -> None:
    (explanation,) = read_report(full).explanations
    assert [group for group, _ in explanation.causes] == [
        "whole model",
        *dict.fromkeys(GROUPS.values()),
    ]
