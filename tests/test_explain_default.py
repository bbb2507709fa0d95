"""explain by default: in_order where it counts, the cost said first, progress, interruption."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fxquant.analysis import explain, worst_first
from fxquant.analysis.explanation import DEFAULT_METHODS, FULL_METHODS
from fxquant.analysis.inputs import named_graph
from fxquant.analysis.prediction import expected, planned_sites, predict
from fxquant.analysis.progress import Progress, clock
from fxquant.analysis.purse import Purse
from fxquant.analysis.reading import opposed, settled
from fxquant.analysis.report import Explanation
from fxquant.analysis.results import is_ranked
from fxquant.cli.main import main
from fxquant.cli.signals import terminable
from fxquant.errors import CalibrationError, SchemeError
from fxquant.schemes.scheme import Scheme
from tests.architectures import token_ids
from tests.models import SMALL_OPT
from tests.processes import BOUND, FXQUANT, started
from tests.test_explain import tiny
from tests.test_tracing import traced

SCHEMES = ("w8a8-static:p99", "w4/a8-dynamic-token", "w3")


# in_order where it counts -------------------------------------------------------------------------


@pytest.mark.parametrize("allowance", [0.0, 1.5, 100.0])
@pytest.mark.parametrize("name", ["opt", "llama", "gptj"])
def test_the_worst_blocks_have_the_figures_of_in_order(
    name: str, allowance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as in_order of every site, and with the other blocks the same sum."""
    monkeypatch.setattr("fxquant.analysis.study.ALLOWANCE", allowance)
    found = tiny(name, SCHEMES[0], methods="in_order:worst", worst=2)
    whole = tiny(name, SCHEMES[0], methods=("in_order", "in_order:blocks"), worst=0)
    every = {site.site: site.effects["in_order"] for site in whole.sites}
    ranked = {s.site: s.effects["in_order"] for s in found.sites if "in_order" in s.effects}
    assert ranked == {path: every[path] for path in ranked}
    assert len(set(ranked.values())) > 1
    blocks = {group.name: group.measured["in_order:blocks"] for group in found.blocks}
    expected = {group.name: group.measured["in_order:blocks"] for group in whole.blocks}
    assert blocks == pytest.approx(expected, abs=1e-9)
    assert sum(blocks.values()) == pytest.approx(found.delta_loss, abs=1e-9)
    # A block whose sites were measured: they sum to it. The worst block always is one.
    sums = {group.name: group.sums["in_order"] for group in found.blocks if group.sums}
    assert sums == pytest.approx({key: blocks[key] for key in sums}, abs=1e-9)
    inside = {block: value for block, value in blocks.items() if block.split(".")[-1].isdigit()}
    assert max(inside, key=lambda block: inside[block]) in sums
    assert all(is_ranked(site, "in_order") for site in found.worst[: len(ranked)])
    assert found.worst[0].site == max(ranked, key=lambda path: ranked[path])
    closed = [blocks[name] for name in blocks if name not in sums]
    assert (len(ranked) < len(every)) == bool(closed)
    text = str(found)
    partly = f"({len(ranked)} of {len(every)} measured, those of the worst blocks"
    assert (partly in text) == bool(closed)
    assert text.count("sites not opened") == len(closed)
    third = sorted(ranked.values())[-3]
    certain = sum(value >= max(closed, default=-math.inf) for value in ranked.values())
    assert settled(found) == certain
    if allowance == 100:
        assert all(value <= third for value in closed)
    if closed:
        assert ("No block that was not opened adds as much" in text) == (certain >= 3)
        assert ("as a whole than the last of them, and were not" in text) == (certain < 3)
    else:
        assert "not opened" not in text


class Scripted:
    """Sites whose losses are known: blocks of three sites each, and what opening them costs."""

    def __init__(self, values: list[list[float]], behind: float) -> None:
        self.sites: Any = [
            SimpleNamespace(path=f"{block}.{index}", node=3 * block + index)
            for block, each in enumerate(values)
            for index in range(len(each))
        ]
        self.values = {
            site.path: value
            for site, value in zip(self.sites, itertools.chain(*values), strict=True)
        }
        self.behind, self.opened = behind, set[str]()

    def position(self, node: int) -> int:
        return node

    def share_behind(self, node: int) -> float:
        return self.behind

    def start(self) -> None: ...

    def advance(self, cuts: None, node: int, under: object) -> None: ...

    def loss(self, under: object, cuts: None) -> float:
        raise AssertionError("known losses are not run")

    def steps(self, wanted: int, allowance: float, monkeypatch: pytest.MonkeyPatch) -> set[str]:
        """The sites that are measured when blocks are opened."""
        monkeypatch.setattr(worst_first, "setting", lambda sites: None)
        losses = dict(zip(self.values, itertools.accumulate(self.values.values()), strict=True))
        found = worst_first.steps(
            self,  # type: ignore[arg-type]
            self.sites,
            {site.path: site.path[0] for site in self.sites},
            0.0,
            lambda path, _: losses[path],
            lambda items, count, forwards: items,
            wanted,
            allowance,
        )
        measured = {site: self.values[site] for site in found.sites}
        assert found.sites == pytest.approx(measured)
        return set(found.sites)


def test_blocks_are_opened_until_the_worst_sites_are_settled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A block that adds more than the last of the sites asked for is opened, however late."""
    values = [[0.1, 0.0, 4.0], [0.0, 0.2, 2.0], [0.5, 0.6, 0.4], [0.0, 0.0, 1.0], [0.3, 0.2, 0.1]]
    known = Scripted(values, behind=0.5)
    assert {path[0] for path in known.steps(1, 100, monkeypatch)} == {"0"}
    assert {path[0] for path in known.steps(2, 100, monkeypatch)} == {"0", "1"}
    assert {path[0] for path in known.steps(3, 100, monkeypatch)} == {"0", "1", "2", "3"}
    assert {path[0] for path in known.steps(99, 100, monkeypatch)} == set("01234")
    assert {path[0] for path in known.steps(3, 0, monkeypatch)} == {"0"}


def test_a_block_too_dear_does_not_hide_those_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Scripted([[3.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.1, 1.0]], behind=0.9)
    # Three sites cost 1.9 to open, two cost 1.
    found = known.steps(3, 2.95, monkeypatch)
    assert {path[0] for path in found} == {"0", "2"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_default_answers_where_why_and_what_repairs(scheme: str) -> None:
    found = tiny("llama", scheme)
    assert found.methods == DEFAULT_METHODS
    assert not any("rescue" in site.effects for site in found.sites)
    assert found.path is None
    tolerance = 1e-9 * max(1, abs(found.delta_loss))
    kinds = sum(kind.measured["in_order:kinds"] for kind in found.kinds)
    blocks = sum(block.measured["in_order:blocks"] for block in found.blocks)
    assert found.causes is not None
    for total in (kinds, blocks, sum(found.causes.values())):
        assert total == pytest.approx(found.delta_loss, abs=tolerance)
    assert found.ranking == "in_order"
    assert {each.site for each in found.counterfactuals} == {each.site for each in found.worst[:3]}
    assert [step.fixed for step in found.recovery][:3] == [0, 1, 2]
    text = str(found)
    assert "Run: in_order by block, and by site in the worst blocks" in text
    assert "Not run: in_order, causes:kinds, rescue, path, alone, first_order (--methods" in text


def test_the_full_study_goes_on_from_the_default(tmp_path: Path) -> None:
    """What the default measured is not measured again."""
    tiny("opt", "w3", output=tmp_path)
    (kept,) = tmp_path.glob("losses-*.jsonl")
    before = kept.read_text()
    found = tiny("opt", "w3", methods="full", output=tmp_path)
    assert found.methods == FULL_METHODS
    after = kept.read_text()
    assert after.startswith(before)
    names = [json.loads(line)["name"] for line in after.splitlines()]
    assert len(names) == len(set(names))
    assert sum(name.startswith("in_order ") for name in names) == len(found.sites)


def test_without_calibration_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the forward that is timed."""
    monkeypatch.setattr("fxquant.analysis.explanation.plain_forward", lambda _: 1 / 0)
    with pytest.raises(CalibrationError):
        explain(traced("opt")[1], "w8a8-static", data=token_ids(1, 8))


# What it is going to cost -------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*SCHEMES, "w8a8-dynamic+attn8"])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_the_predicted_cost_holds(name: str, scheme: str) -> None:
    """Every step is named; none costs more than was said, and most of it is spent."""
    methods = (*DEFAULT_METHODS, "causes:kinds", "alone", "path", "first_order", "rescue:blocks")
    found = tiny(name, scheme, methods=methods, worst=2)
    named = named_graph(traced(name)[1], Scheme.parse(scheme))
    steps = {
        step.name: step.forwards
        for step in predict(named, planned_sites(named, Scheme.parse(scheme)), methods, 2, 1.0)
    }
    assert steps.keys() - {"calibration"} >= found.costs.keys()
    for step, cost in found.costs.items():
        assert cost.forwards <= 1.02 * steps[step] + 0.1, step
    spent = sum(cost.forwards for cost in found.costs.values())
    assert spent > 0.5 * sum(steps.values())


def test_the_cost_is_said_before_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    tiny("opt", "w8a8-static:p99", progress=True, methods=("alone", "path"), worst=0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        "explain: w8a8-static:p99 on 2 windows of 20 tokens: alone at every site; path"
    )
    assert re.fullmatch(
        r"explain: at most \d+ forwards of all windows, [\d.e-]+ s each: about \d+ s", lines[1]
    )
    assert lines[2].startswith("explain: not run: in_order, causes, causes:kinds, rescue, first")
    assert "--full" in lines[2]
    assert "local figures 1 of 2" in lines[3]
    tiny("opt", "w4-g16+gptq", progress=True, methods="alone", worst=0)
    assert ", and what gptq takes" in capsys.readouterr().err


@pytest.mark.parametrize(("scheme", "calibrates"), [("w8a8-static", True), ("w8a8-dynamic", False)])
def test_only_what_calibrates_is_predicted_to(scheme: str, calibrates: bool) -> None:
    batches = [{"input_ids": token_ids(3, 20)}]
    steps = expected(traced("opt")[1], Scheme.parse(scheme), ("alone",), 1, 40, batches)
    found = {step.name: step.forwards for step in steps}
    assert found.get("calibration", 0.0) == (1.5 if calibrates else 0.0)
    assert found["other choices"] > 1.5


def test_what_does_not_fit_into_the_time_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The backbone is there all the same, and more time goes on from it."""
    short = tiny("llama", SCHEMES[0], minutes=0, progress=True, output=tmp_path)
    said = capsys.readouterr().err.splitlines()[1]
    assert "what can be left out is not started after 0 s: about" in said
    assert short.methods == ("in_order:worst", "causes")
    assert "in_order:kinds" in short.left_out
    assert short.left_out[0].startswith("other choices at the next 2: ")
    assert "Left out, since 0 s had passed or would have: other choices" in str(short)
    blocks = sum(block.measured["in_order:blocks"] for block in short.blocks)
    assert blocks == pytest.approx(short.delta_loss, abs=1e-9)
    assert {c.site for c in short.counterfactuals} == {short.worst[0].site}
    assert short.recovery == ()
    (kept,) = tmp_path.glob("losses-*.jsonl")
    before = kept.read_text()
    longer = tiny("llama", SCHEMES[0], minutes=10, output=tmp_path)
    assert longer.left_out == ()
    assert kept.read_text().startswith(before)
    assert longer.methods == DEFAULT_METHODS
    assert "Left out" not in str(longer)
    whole = tiny("llama", SCHEMES[0], minutes=math.inf)
    assert whole.sites == longer.sites
    assert whole.time_limit is None
    # Methods that are asked for are run, whatever the time.
    asked = tiny("llama", SCHEMES[0], methods=("alone", "in_order:kinds"), minutes=0)
    assert asked.left_out == ()
    assert len(asked.recovery) > 2
    with pytest.raises(SchemeError, match="minutes must be at least 0, got nan"):
        tiny("llama", SCHEMES[0], minutes=math.nan)


def test_the_purse_empties(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("fxquant.analysis.purse.time.monotonic", lambda: now)
    purse = Purse(60)
    now = 130.0
    assert purse.left == 30
    assert purse.holds(30)
    assert not purse.holds(31)
    assert Purse().holds(1e9)


# Reading the figures ------------------------------------------------------------------------------


def test_a_site_that_is_worse_in_float_is_called_out() -> None:
    """Where its figure and what float recovers differ in sign, and only there."""
    found = tiny("opt", SCHEMES[0], worst=2, methods=("in_order", "in_order:kinds"))
    first, second = found.worst[:2]
    by_site = {choice.site: choice for choice in found.counterfactuals if choice.choice == "float"}

    def with_recovered(one: float, two: float) -> Explanation:
        changed = {first.site: one, second.site: two}
        return replace(
            found,
            counterfactuals=tuple(
                replace(each, recovered=changed[site]) for site, each in by_site.items()
            ),
        )

    assert first.effects["in_order"] > 0
    agreeing = with_recovered(0.2, 0.3)
    assert list(opposed(agreeing)) == []
    assert "gets worse" not in str(agreeing)
    contrary = with_recovered(-1.25, 0.3)
    assert [(site.site, value) for site, value in opposed(contrary)] == [(first.site, -1.25)]
    effect = f"{first.effects['in_order']:+.4f}"
    assert (
        f"{first.site} adds {effect} to those before it, and yet the loss gets worse by 1.2500 "
        "when it alone is left in float"
    ) in str(contrary)
    lowering = replace(
        contrary,
        sites=tuple(replace(s, effects={"in_order": -s.effects["in_order"]}) for s in found.sites),
        counterfactuals=tuple(replace(c, recovered=0.5) for c in by_site.values()),
    )
    assert "makes up for that of others there" in str(lowering)


# Progress -----------------------------------------------------------------------------------------


def test_plain_lines_come_seldom_and_say_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("fxquant.analysis.progress.time.monotonic", lambda: now)
    shown = Progress(True, {"one": 30.0, "two": 10.0})
    for _ in shown.over(range(30), "one", 30):
        now += 2  # twice as slow as expected
    with shown.step("two", 2) as advance:
        advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "explain: one 1 of 30, 2 s passed, about 39 s left"
    assert lines[2] == "explain: one 7 of 30, 14 s passed, about 1 min 06 s left"
    assert lines[-1] == "explain: one 28 of 30, 56 s passed, about 24 s left"
    assert len(lines) == 10
    for hidden in (Progress(False), Progress(None)):
        assert list(hidden.over("ab", "name", 2)) == ["a", "b"]
        hidden.say("nothing")
    assert capsys.readouterr().err == ""


def test_a_terminal_has_bars(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(Progress(None).over("ab", "name", 2)) == ["a", "b"]
    shown = capsys.readouterr().err
    assert "name:" in shown
    assert "passed" not in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (7440, "2 h 04 min"),
    ],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# Interruption -------------------------------------------------------------------------------------


COMMAND = ("explain", "--model", str(SMALL_OPT), "--scheme", "w8a8-static", "--length", "32")


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_says_what_is_kept(tmp_path: Path, name: str, status: int) -> None:
    """The process ends itself, without a traceback, and the same command goes on."""
    command = [*FXQUANT, *COMMAND, "--full", "--windows", "8", "--output", str(tmp_path)]
    with started(command, interruptible=True) as process:
        until = time.monotonic() + BOUND
        while not any(path.stat().st_size for path in tmp_path.glob("losses-*.jsonl")):
            time.sleep(0.01)
            assert process.poll() is None
            assert time.monotonic() < until
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=BOUND)
    assert process.returncode == status
    assert "Traceback" not in err
    told = re.search(rf"fxquant: interrupted by {name}: (\d+) finished losses; the same", err)
    assert told is not None, err
    assert f"goes on from {tmp_path}" in err
    (kept,) = tmp_path.glob("losses-*.jsonl")
    assert len(kept.read_text().splitlines()) == int(told[1]) > 0
    assert out == ""


def test_an_interruption_without_output_keeps_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("fxquant.analysis.study.local_figures", stop)
    assert main([*COMMAND, "--calibration-windows", "1"]) == 143
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "fxquant: interrupted by SIGTERM: 0 finished losses, and nothing is kept: --output DIR "
        "keeps finished losses"
    )
    monkeypatch.setattr("fxquant.evaluation.job.load_model", stop)
    assert main([*COMMAND]) == 143
    assert "interrupted by SIGTERM before the first result" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_interrupted_plan_says_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's losses are kept too, and the same command does not measure them again."""
    short = ["--windows", "1", "--length", "32", "--calibration-windows", "0", "--budget", "0.05"]
    command = ["plan", "--model", str(SMALL_OPT), *short, "--choices", "w8", "fp"]
    command += ["--output", str(tmp_path)]

    def stop(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with monkeypatch.context() as patch:
        patch.setattr("fxquant.analysis.planner.climbs", stop)
        assert main(command) == 143
    (kept,) = tmp_path.glob("losses-*.jsonl")
    before = kept.read_text()
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"fxquant: interrupted by SIGTERM: {len(before.splitlines())} finished losses; the same "
        f"command goes on from {tmp_path}"
    )
    assert main(command) == 0
    assert kept.read_text().startswith(before)
    assert kept.read_text().count('"name": "alone') == before.count('"name": "alone')


def test_signals_are_left_alone_in_other_threads() -> None:
    seen: list[Any] = []

    def run() -> None:
        with terminable() as received:
            seen.append((signal.getsignal(signal.SIGTERM), received.status(130)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert seen == [(signal.SIG_DFL, 130)]
