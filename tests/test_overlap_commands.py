"""Each command keeps calibration and evaluation apart; any two commands do, or are refused.

What each of them read is asked of the files that it wrote, by position in the text.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fxquant
from fxquant.cli.main import main
from fxquant.ir.graph import info
from tests.models import SMALL_OPT
from tests.test_overlap import prose

HELD_OUT = 2
SETTINGS = st.fixed_dictionaries(
    {
        "windows": st.integers(1, 6),
        "length": st.integers(12, 48),
        "stride": st.one_of(st.none(), st.integers(3, 12)),
        "calibration-windows": st.integers(1, 5),
        "calibration-length": st.one_of(st.none(), st.integers(12, 40)),
        "seed": st.integers(0, 9),
    }
)
STRIDED = ("evaluate", "convert", "inspect", "sweep")
Records = list[dict[str, Any]]


def options(named: dict[str, Any]) -> list[str]:
    pairs = [(f"--{name}", str(value)) for name, value in named.items() if value is not None]
    return [part for pair in pairs for part in pair]


def printed(command: list[str]) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(command) == 0, command
    return output.getvalue()


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def evaluate(common: list[str], folder: Path) -> Records:
    printed(["evaluate", *common, "--schemes", "w8a8-static", "--output", str(folder)])
    return list(read_json(folder / "results.json")["rows"][-1]["calibration"])


def convert(common: list[str], folder: Path) -> Records:
    printed(["convert", *common, "--scheme", "w8a8-static", "--output", str(folder)])
    return list(read_json(folder / "graph.json")["info"]["calibration"])


def inspect(common: list[str], folder: Path) -> Records:
    shown = printed(["inspect", *common, "--scheme", "w8a8-static", "--format", "json"])
    return list(json.loads(shown)["calibration"])


def explain(common: list[str], folder: Path) -> Records:
    narrow = ["--methods", "alone:kinds", "--worst", "0", "--sites", "*layers.0*"]
    printed(["explain", *common, "--scheme", "w8a8-static", *narrow, "--output", str(folder)])
    return list(read_json(folder / "explanation.json")["calibration"])


def plan(common: list[str], folder: Path) -> Records:
    more = ["--budget", "9", "--choices", "w8a8-static", "fp"]
    more += ["--held-out-windows", str(HELD_OUT), "--output", str(folder)]
    printed(["plan", *common, *more])
    return list(read_json(folder / "plan.json")["calibration"])


def sweep(common: list[str], folder: Path) -> Records:
    named = dict(zip(common[::2], common[1::2], strict=True))
    lines = [f'models = ["{named.pop("--model")}"]', f'datasets = ["{named.pop("--text")}"]']
    lines += ['schemes = ["w8a8-static"]', f"seeds = [{named.pop('--seed')}]"]
    lines += [f"{name[2:].replace('-', '_')} = {value}" for name, value in named.items()]
    file = folder.with_suffix(".toml")
    file.write_text("\n".join(lines) + "\n")
    printed(["sweep", str(file), "--output", str(folder)])
    cells = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [each for cell in cells for each in cell["figures"]["calibration"]]


COMMANDS: dict[str, Callable[[list[str], Path], Records]] = {
    each.__name__: each for each in (evaluate, convert, inspect, explain, plan, sweep)
}


def spans(records: Records) -> Iterator[tuple[int, int]]:
    for record in records:
        for _, first, end in record["origin"]["spans"]["spans"]:
            yield first, end


def evaluated(cut: dict[str, Any], windows: int) -> list[set[int]]:
    step, length = cut["stride"] or cut["length"], cut["length"]
    return [set(range(n * step, n * step + length)) for n in range(windows)]


def check_commands(number: int, first: dict[str, Any], second: dict[str, Any]) -> list[int]:
    """``first`` of every command, then ``second`` of the graph that one of them saved: which of
    its windows were calibrated on."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "some.txt"
        file.write_text(prose(number, 500))
        base = ["--model", str(SMALL_OPT), "--text", str(file)]
        for name, command in COMMANDS.items():
            given = first if name in STRIDED else {**first, "stride": None}
            records = command([*base, *options(given)], Path(folder) / name)
            windows = first["windows"] + (HELD_OUT if name == "plan" else 0)
            kept_apart = set[int]().union(*evaluated(given, windows))
            read = list(spans(records))
            size = first["calibration-length"] or first["length"]
            assert len(read) == first["calibration-windows"], name
            assert all(end - start == size for start, end in read), name
            assert not any(kept_apart & set(range(*each)) for each in read), name
        return check_another(Path(folder), file, second)


def check_another(folder: Path, file: Path, second: dict[str, Any]) -> list[int]:
    """The converted graph, evaluated on other windows: refused where they share a token."""
    saved = folder / "convert"
    (record,) = info(fxquant.load(saved)).calibration or ()
    assert record.origin is not None
    read = set[int]().union(*(range(a, b) for _, a, b in record.origin.spans.spans))
    cut = {name: second[name] for name in ("windows", "length", "stride")}
    shared = [n for n, each in enumerate(evaluated(second, second["windows"])) if each & read]
    out = folder / "other"
    command = ["evaluate", "--model", str(saved), "--text", str(file), *options(cut)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as no:
        code = main([*command, "--output", str(out)])
    assert code == (2 if shared else 0)
    if shared:
        assert f"{len(shared)} of the {second['windows']} window" in no.getvalue()
        printed([*command, "--output", str(out), "--allow-overlap"])
    assert read_json(out / "results.json")["rows"][-1]["overlap"] == shared
    return shared


def asked(windows: int, length: int, stride: int | None, count: int, size: int) -> dict[str, Any]:
    names = ("windows", "length", "stride", "calibration-windows", "calibration-length", "seed")
    return dict(zip(names, (windows, length, stride, count, size, 3), strict=True))


def test_no_command_and_the_next_share_a_token_unseen() -> None:
    assert check_commands(1, asked(4, 24, 8, 5, 20), asked(6, 48, None, 1, 12))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 20), SETTINGS, SETTINGS)
def test_no_two_commands_share_a_token_unseen(
    number: int, first: dict[str, Any], second: dict[str, Any]
) -> None:
    check_commands(number, first, second)
