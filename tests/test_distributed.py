"""Runs in several processes, started by torchrun: the same figures, and no half results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from fxquant.cli.main import main
from fxquant.run.distributed import is_main, session, shard, world_size
from tests.models import SMALL_OPT
from tests.processes import finished

SHORT = ["--windows", "5", "--length", "48", "--calibration-windows", "4"]
SCHEMES = ["--schemes", "w8a8-dynamic", "w8a8-static", "w8a8-static:absmax+smooth"]
JOB = ["--model", str(SMALL_OPT), *SCHEMES, *SHORT]


def torchrun(processes: int, *command: str) -> CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = (*launcher, "--nproc-per-node", str(processes), *command)
    return finished(command, OMP_NUM_THREADS="1")


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())["rows"]
    return found


def test_one_process_is_the_whole_world() -> None:
    with session("cpu") as device:
        assert (device, world_size(), is_main()) == ("cpu", 1, True)
        assert shard("abc") == [(0, "a"), (1, "b"), (2, "c")]


@pytest.mark.slow
def test_observers_merge_to_what_one_process_sees() -> None:
    done = torchrun(3, "-m", "tests.distributed_observers")
    assert done.returncode == 0, done.stderr
    assert all(f"process {rank} of 3 agrees" in done.stdout for rank in range(3))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of the job in this process."""
    folder = tmp_path_factory.mktemp("alone")
    assert main(["evaluate", *JOB, "--output", str(folder)]) == 0
    return rows(folder)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_figures_do_not_depend_on_the_number_of_processes(
    processes: int, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    done = torchrun(processes, "-m", "fxquant.evaluation", *JOB, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| w8a8-static ") == 1  # only one process prints
    assert len(alone) == 4
    for row, other in zip(alone, rows(tmp_path), strict=True):
        for name in ("loss", "perplexity", "delta_loss"):
            assert other[name] == pytest.approx(row[name], rel=1e-9, abs=1e-9)
        assert other["share_clipped"] == row["share_clipped"]
    provenance = json.loads((tmp_path / "results.json").read_text())["provenance"]
    assert provenance["processes"] == processes


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "failed"])
def test_a_process_that_ends_stops_the_run(how: str, tmp_path: Path) -> None:
    done = torchrun(2, "-m", "tests.distributed_death", how, *JOB, "--output", str(tmp_path))
    assert done.returncode != 0
    if how == "failed":
        assert "fxquant: error: layers.0.fc1: computes NaN" in done.stderr
    assert "another process of this run has ended, so process 0 of 2 stops too" in done.stderr
    assert done.stdout == ""
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["complete"] is False
    assert [row["scheme"] for row in kept["rows"]] == ["fp"]
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "table.md"}
