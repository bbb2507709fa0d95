"""What the second environment leaves out, and that both are pinned alike."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.environments import LONGEST, NO_MODEL

ROOT = Path(__file__).parent.parent
# What reads, traces, converts or runs a model, or builds one.
OF_MODELS = (
    "transformers", "tests.architectures", "tests.models", "fxquant.checkpoint", "fxquant.cli",
    "fxquant.frontends", "fxquant.passes", "fxquant.pipeline", "fxquant.recipes", "fxquant.run",
)  # fmt: skip
# transformers, and what its versions ask for in different ranges.
OF_TRANSFORMERS = {"transformers", "huggingface_hub", "tokenizers"}


def imported(path: Path) -> set[str]:
    """Names of the modules that a test file imports, those of its helpers' imports too."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop().read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in set(names) - found:
                found.add(name)
                file = ROOT / f"{name.replace('.', '/')}.py"
                if name.startswith("tests.") and file.exists():
                    waiting.append(file)
    return found


# Programs that test_triton_kernels.py starts by name, which no import shows.
STARTED = ("triton_calls.py", "triton_variants.py")


@pytest.mark.parametrize("name", [*NO_MODEL, *STARTED])
def test_what_the_second_environment_leaves_out_knows_no_model(name: str) -> None:
    found = imported(ROOT / "tests" / name)
    assert not {n for n in found if n.startswith(OF_MODELS)}


def test_what_is_started_first_is_there() -> None:
    assert not [name for name in LONGEST if not (ROOT / "tests" / name).exists()]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_measurements_start_in_either_environment(path: Path) -> None:
    """What a benchmark imports is there, whichever transformers is installed."""
    importlib.import_module(f"benchmarks.{path.stem}")


def test_imports_are_followed_through_helpers() -> None:
    assert "transformers" in imported(ROOT / "tests" / "test_streaming.py")
    assert "transformers" in imported(ROOT / "tests" / "test_sequential.py")


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return dict(pairs)


def test_the_environments_differ_in_transformers_alone() -> None:
    first, second = pins("constraints.txt"), pins("constraints-5.txt")
    assert not first.keys() - second.keys()
    assert {n for n, version in first.items() if second[n] != version} == OF_TRANSFORMERS


def test_both_are_within_the_ranges_that_are_promised() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in ("constraints.txt", "constraints-5.txt"):
        pinned = pins(name)
        for line in project["dependencies"]:
            package, least, below = re.fullmatch(r"([\w-]+)>=([\d.]+),<([\d.]+)", line).groups()  # type: ignore[union-attr]
            assert numbers(least) <= numbers(pinned[package]) < numbers(below), line


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def recipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What make would do, whichever make started this test with whichever variables."""
    started = ("ENV", "MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS")
    return subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--always-make", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
        env={name: value for name, value in os.environ.items() if name not in started},
    )  # fmt: skip


@pytest.mark.needs_program(shutil.which("make"), "make")
def test_the_same_recipes_make_either() -> None:
    first, second = (recipe("demo", *environment).stdout for environment in ([], ["ENV=5"]))
    assert "--constraint constraints.txt" in first
    renamed = re.sub(r"(\.venv|constraints|results/demo)\b(?!-5)", r"\1-5", first)
    assert renamed == second
    assert "ENV is 5 or left out" in recipe("test", "ENV=6").stderr
