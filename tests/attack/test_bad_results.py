"""Results folders with damaged files: a report that can be written, or one error naming the file.

The seed, in each assertion, follows --seed, or is FXQUANT_FUZZ_SEED.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxquant.errors import FxquantError
from fxquant.evaluation.journal import read_journal
from fxquant.evaluation.report.page import read_report, render
from fxquant.evaluation.sweep_tables import format_results
from tests.attack.bad import refused
from tests.attack.conftest import SeedOf
from tests.attack.json_mutations import mutated
from tests.report_folder import write_folder

SEED = 20261127
CONTENTS = {
    "empty": b"", "null": b"null\n", "number": b"3\n", "text": b'"x"\n', "list": b"[[]]\n",
    "object": b"{}\n", "not utf-8": b'{"a": "\xff"}\n', "half": b'{"a": "\\ud800"}\n',
    "deep": b"[" * 100_000 + b"\n", "deeper than shown": b'{"a":' * 200 + b"1" + b"}" * 200 + b"\n",
    "long number": b'{"a": ' + b"9" * 401 + b"}\n", "longer": b'{"a": ' + b"9" * 5000 + b"}\n",
    "inf": b'{"a": 1e400}\n', "nan": b'{"rows": NaN}\n', "mark": b"\xef\xbb\xbf{}\n",
    "utf-16": "{}\n".encode("utf-16"), "zeros": bytes(99) + b"\n",
}  # fmt: skip
NAMES = ("results.json", "results.jsonl", "explanation.json", "inspect.json")


@pytest.mark.parametrize("kind", CONTENTS)
def test_files_that_are_no_results(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        folder = write_folder(tmp_path / name)
        (folder / name).write_bytes(CONTENTS[kind])
        if name.endswith("l") and kind == "empty":
            continue  # a sweep that has not finished a cell
        refused(capsys, ("report", folder), name)
        if name == "results.jsonl":
            refused(capsys, ("table", folder / name), name)


@pytest.mark.parametrize("name", NAMES)
def test_pipes_and_folders(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "results")
    for make in (os.mkfifo, Path.mkdir):
        (folder / name).unlink() if (folder / name).exists() else None
        make(folder / name)
        refused(capsys, ("report", folder), name)
        refused(capsys, ("table", folder / name), name)
        if make is Path.mkdir:
            (folder / name).rmdir()


FALSE: dict[str, tuple[Callable[[str], str], str]] = {
    "another scheme": (lambda line: line.replace('"scheme": "w8"', '"scheme": "w4"', 1), "scheme"),
    "another engine": (lambda line: line.replace("{", '{"engine": "llama.cpp 1", ', 1), "engine"),
    "a key twice": (lambda line: line.replace("{", '{"scheme": "fp", ', 1), "twice"),
    "another loss": (lambda line: line.replace('"loss": 2', '"loss": 1'), "figures.loss"),
    "a negative loss": (lambda line: line.replace('_nll": [', '_nll": [-'), "figures.window_nll"),
    "another perplexity": (lambda line: line.replace('ty": 1', 'ty": 2'), "figures.perplexity"),
    "no perplexity": (lambda line: line.replace('ty": 1', 'ty": -1'), "figures.perplexity"),
}


@pytest.mark.parametrize("kind", FALSE)
def test_lines_that_say_two_things(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_folder(tmp_path / "results") / "results.jsonl"
    change, named = FALSE[kind]
    lines = file.read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if '"scheme": "w8"' in line)
    before, lines[at] = lines[at], change(lines[at])
    assert lines[at] != before
    file.write_text("\n".join(lines) + "\n")
    refused(capsys, ("table", file), f"line {at + 1}", named)


def write(path: Path, value: Any) -> None:
    lines = value if path.suffix == ".jsonl" and isinstance(value, list) else [value]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_values_that_are_none(count: int, tmp_path: Path, seed_of: SeedOf) -> None:
    seed = seed_of(SEED) + count
    rng, counts = random.Random(seed), Counter[str]()
    originals: dict[str, Any] = {}
    for path in sorted(write_folder(tmp_path / "whole").iterdir()):
        lines = [json.loads(line) for line in path.read_text().splitlines()] if (
            path.suffix == ".jsonl") else json.loads(path.read_text())  # fmt: skip
        originals[path.name] = lines
    folder = tmp_path / "changed"
    folder.mkdir()
    for index in range(count):
        name = rng.choice(sorted(originals))
        write(folder / name, mutated(originals[name], rng, rng.choice((1, 1, 3))))
        where = f"seed {seed}, change {index} of {name}"
        try:
            report = read_report(folder)
            if index % 10 == 0:
                render(report).encode()
            if name.endswith("l"):
                format_results(read_journal(folder / name)).encode()
            counts["right"] += 1
        except FxquantError as error:
            counts["one clear error"] += 1
            if name not in str(error) and str(folder) not in str(error):
                pytest.fail(f"{where}: {error}")
        except Exception as error:
            raise AssertionError(f"{where}: {error!r}") from error
        (folder / name).unlink()
    print(f"seed {seed}: {count} tried, {dict(counts)}, 0 wrong")
    assert count < 1000 or min(counts.values()) > count // 10  # of many
