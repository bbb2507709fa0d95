"""Full disks, limits of a file's size, places that cannot be written, two runs at once, kills."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.analysis import explain
from fxquant.checkpoint.save_load import check_target
from fxquant.checkpoint.target import held_target
from fxquant.cli.main import main
from fxquant.errors import CheckpointError, WriteError
from fxquant.evaluation.journal import read_journal
from fxquant.files.locks import LOCK, hold, hold_folder
from fxquant.files.whole_file import write_text
from fxquant.ir.streamed import Workspace
from tests.architectures import llama, opt, token_ids
from tests.attack.bad import pairs
from tests.attack.conftest import SeedOf
from tests.kills import killed
from tests.models import SMALL_OPT
from tests.processes import BOUND, FXQUANT, finished, started

SEED = 30
MODEL = ["--model", str(SMALL_OPT)]
SHORT = [*MODEL, "--length", "48", "--calibration-windows", "2"]
EXPLAIN = ["explain", *SHORT, "--scheme", "w8", "--windows", "1", "--methods", "alone"]
PLAN = ["plan", *SHORT, "--budget", "1", "--windows", "1", "--choices", "w4", "w8"]
COMMANDS = {
    "evaluate": ["evaluate", *SHORT, "--windows", "2", "--schemes", "w8", "w4"],
    "explain": [*EXPLAIN, "--worst", "0"],
    "plan": PLAN,
    "convert": ["convert", *SHORT, "--scheme", "w8"],
    "export": ["export", *SHORT, "--scheme", "w8", "--to", "compressed-tensors", "--no-check"],
}


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: as a full disk, in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def small_disk(folder: Path, size: str, options: str = "") -> Iterator[None]:
    """A tmpfs at ``folder``, where this machine lets us mount one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(folder)]
    done = finished(command)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        done = finished(["umount", str(folder)])
        assert done.returncode == 0, done.stderr


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def sweep_file(folder: Path) -> Path:
    file = folder / "s.toml"
    options = "windows = 2\nlength = 48\ncalibration_windows = 2\n"
    schemes = 'schemes = ["w8", "w4", "w8a8-dynamic"]\n'
    file.write_text(f'models = ["{SMALL_OPT}"]\n{schemes}{options}')
    return file


def command_for(name: str, folder: Path, output: Path) -> list[str]:
    start = ["sweep", str(sweep_file(folder))] if name == "sweep" else COMMANDS[name]
    return [*start, "--output", str(output)]


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), pairs([*COMMANDS, "sweep"], [0, 300]))
def test_a_file_size_limit_is_one_clear_error(
    name: str, size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = command_for(name, tmp_path, output)
    with file_limit(size):
        assert main(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fxquant: error: cannot write")
    assert str(output) in said or "name another folder in TMPDIR" in said
    assert "File too large" in said
    left = names(tmp_path) - {"s.toml"}
    assert not [path for path in left if "partial" in path or "lock" in path]
    assert main(command) == 0  # nothing is in the way afterwards


def test_finished_rows_are_printed_before_leaving(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    assert main(command_for("evaluate", tmp_path, whole)) == 0
    size = (whole / "results.json").stat().st_size
    capsys.readouterr()
    output = tmp_path / "out"
    with file_limit(size - 100):
        assert main(command_for("evaluate", tmp_path, output)) == 2
    printed = capsys.readouterr()
    assert [line.split()[1] for line in printed.out.splitlines()[2:5]] == ["fp", "w8", "w4"]
    assert "3 of 3 rows are finished" in printed.out
    assert "the file that is there is unchanged" in printed.err
    kept = json.loads((output / "results.json").read_text())
    assert [row["scheme"] for row in kept["rows"]] == ["fp", "w8"]
    assert kept["complete"] is False


def test_a_sweep_keeps_and_prints_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    assert main(command_for("sweep", tmp_path, whole)) == 0
    lines = (whole / "results.jsonl").read_bytes().splitlines(keepends=True)
    size = sum(map(len, lines[:2])) + len(lines[2]) // 2
    capsys.readouterr()
    with file_limit(size):
        assert main(command_for("sweep", tmp_path, output)) == 2
    printed = capsys.readouterr()
    assert "the 2 before are kept there" in printed.err
    assert all(f"| {scheme} " in printed.out for scheme in ("fp", "w8", "w4"))
    content = (output / "results.jsonl").read_bytes()
    assert content.count(b"\n") == 2
    assert content.endswith(b"\n")  # what was torn is cut away at once
    assert main(command_for("sweep", tmp_path, output)) == 0
    assert (output / "results.jsonl").read_bytes().startswith(content)
    assert len(read_journal(output / "results.jsonl")) == 4


def test_losses_are_never_lost_to_a_limit(tmp_path: Path) -> None:
    data = token_ids(2, 20)

    def run() -> object:
        return explain(opt(), "w4", data=data, methods=("alone",), worst=0, output=tmp_path).sites

    whole = run()
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    cut = content[: content.rfind(b"\n", 0, len(content) // 2) + 1]
    path.write_bytes(cut)
    for size in (0, len(cut), len(cut) + 30):
        with file_limit(size), pytest.raises(WriteError, match=f"cannot write .*{tmp_path}"):
            run()
        assert path.read_bytes() == cut
        assert names(tmp_path) == {path.name}
    assert run() == whole
    assert path.read_bytes().startswith(cut)


def test_the_workspace_and_the_cache_say_so(tmp_path: Path) -> None:
    layer = torch.nn.Linear(256, 256)
    with file_limit(2**16), pytest.raises(WriteError, match=r"leaf-000000.*TMPDIR"):
        Workspace(tmp_path).keep(layer)
    assert not names(tmp_path)
    cache, data = tmp_path / "cache", [token_ids(2, 24)]
    with (
        file_limit(2000),
        pytest.raises(WriteError, match=r"layers.0.safetensors.*blocks are kept"),
    ):
        fxquant.convert(llama(), "w4+gptq", calibration=data, cache=cache)
    assert not names(cache)


SIZES = ["16k", *(pytest.param(size, marks=pytest.mark.slow) for size in ("32k", "64k", "200k"))]


@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a real one: what does not fit is one clear error, what is there stays whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    errors = 0
    with small_disk(disk, size):
        for name in (*COMMANDS, "sweep"):
            code = main(command_for(name, tmp_path, disk / name))
            said = capsys.readouterr().err.splitlines()
            assert code in (0, 2)
            if code:
                errors += 1
                assert said[-1].startswith("fxquant: error: cannot write")
                assert "No space left on device" in said[-1]
            left = names(disk)
            assert not [path for path in left if "partial" in path or "lock" in path]
        with pytest.raises(WriteError, match=r"leaf-000000.*No space left"):
            Workspace(disk).keep(torch.nn.Linear(256, 256))
        assert not (disk / "leaf-000000.safetensors").exists()
        for file in disk.rglob("*.json"):
            json.loads(file.read_text())
        for file in disk.rglob("results.jsonl"):
            read_journal(file)
    print(f"{len(COMMANDS) + 1} commands on {size}: {errors} one clear error, the rest right")
    assert errors


def test_a_full_standard_output_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", full)
        assert main(["inspect", *SHORT, "--scheme", "w8", "--format", "json"]) == 2
    said = capsys.readouterr().err
    assert "fxquant: error: cannot write to standard output: No space left" in said


@pytest.mark.slow
def test_a_process_with_a_full_standard_output_says_one_line() -> None:
    """In a process of its own: Python writes its buffer when it ends."""
    command = [*FXQUANT, "inspect", *SHORT, "--scheme", "w8", "--format", "json"]
    with open("/dev/full", "w") as full:
        done = finished(command, stdout=full)
    assert done.returncode == 2
    assert "fxquant: error: cannot write to standard output: No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


# --- places that cannot be written ----------------------------------------------------------------


@pytest.mark.parametrize("name", [*COMMANDS, "sweep"])
@pytest.mark.parametrize("place", ["below a file", "read-only"])
def test_a_place_that_cannot_be_written_is_refused_before_work(
    name: str,
    place: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fxquant.evaluation.job.load_model", forbidden)
    outer = tmp_path / "place"
    with contextlib.ExitStack() as stack:
        if place == "read-only":
            outer.mkdir()
            stack.enter_context(small_disk(outer, "64k", ",ro"))
        else:
            outer.write_text("")
        assert main(command_for(name, tmp_path, outer / "out")) == 2
    said = capsys.readouterr().err
    assert "fxquant: error: cannot write" in said
    assert str(outer / "out") in said


@pytest.mark.parametrize("command", ["evaluate", "convert"])
def test_a_cache_that_cannot_be_written_is_refused_before_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    scheme = ["--schemes", "w4+gptq"] if command == "evaluate" else ["--scheme", "w4+gptq"]
    options = ["--model", "no/such", *scheme, "--cache", str(tmp_path / "file" / "cache")]
    assert main([command, *options]) == 2
    assert "cannot write to cache folder" in capsys.readouterr().err
    with pytest.raises(WriteError, match="cannot write to cache folder"):
        fxquant.convert(
            opt(), "w4+gptq", calibration=[token_ids(1, 8)], cache=tmp_path / "file" / "cache"
        )


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("before")
    with file_limit(3), pytest.raises(WriteError, match=f"cannot write {path}: .*is unchanged"):
        write_text(path, "longer than three")
    assert path.read_text() == "before"
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}/folder"):
        write_text(tmp_path / "folder", "x")
    assert names(tmp_path) == {"results.json"}
    write_text(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()


# --- two at once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*COMMANDS, "sweep"])
def test_a_second_run_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    lock: contextlib.AbstractContextManager[None] = hold_folder(output)
    if name in ("convert", "export"):
        lock = held_target(output)
    if name == "sweep":
        output.mkdir()
        lock = hold(output / ".results.jsonl.lock", "results")
    command = command_for(name, tmp_path, output)
    with lock:
        before = names(tmp_path)
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "another process is writing to " in said
        assert str(output) in said
        assert f"process {os.getpid()} on " in said
        assert names(tmp_path) == before
    assert main(command) == 0
    assert not [path for path in names(tmp_path) if "lock" in path]


def test_a_second_run_on_one_cache_is_refused(tmp_path: Path) -> None:
    data = [token_ids(2, 24)]
    fxquant.convert(llama(), "w4+gptq", calibration=data, cache=tmp_path)
    (run,) = tmp_path.iterdir()
    with hold_folder(run), pytest.raises(WriteError, match=f"writing to cache folder {run}"):
        fxquant.convert(llama(), "w4+gptq", calibration=data, cache=tmp_path)
    fxquant.convert(llama(), "w4+gptq", calibration=data, cache=tmp_path)


def test_two_saves_at_once_and_what_a_killed_one_left(tmp_path: Path) -> None:
    graph, target = fxquant.convert(opt(), "w8"), tmp_path / "saved"
    fxquant.save(graph, target)
    saving = tmp_path / ".saved.saving.lock"
    with hold(saving, "x"), pytest.raises(CheckpointError, match="another process is writing"):
        fxquant.save(graph, target)
    (tmp_path / ".saved.partial-abcd1234").mkdir()
    (tmp_path / ".saved.old-abcd1234").mkdir()
    target.rename(tmp_path / ".saved.old-abcd1234" / "saved")  # killed between two renames
    check_target(target)
    with file_limit(100), pytest.raises(CheckpointError, match="cannot write"):
        fxquant.save(graph, target)
    fxquant.load(target)
    assert {path.name for path in tmp_path.iterdir()} == {"saved"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMMANDS, "sweep"])
def test_two_processes_at_once(name: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [*FXQUANT, *command_for(name, tmp_path, output)]
    with started(command) as one, started(command) as other:
        runs = (one, other)
        said = [run.communicate(timeout=BOUND)[1] for run in runs]
    codes = [run.returncode for run in runs]
    # The slower one may come when the faster has ended: then it is told what is there, or goes on.
    late = 2 if name == "evaluate" else 0
    assert sorted(codes) in ([0, 2], sorted([0, late])), said
    for code, text in zip(codes, said, strict=True):
        assert code == 0 or "another process is writing" in text or "holds a finished run" in text
    assert not [path for path in names(tmp_path) if "lock" in path or "partial" in path]


# --- kills ----------------------------------------------------------------------------------------


def same_after_kills(folder: Path, kills: int, seed: int) -> None:
    print(f"seed {seed}")
    draw = random.Random(seed)
    calibration, data = [token_ids(2, 24)], token_ids(2, 20)

    def convert() -> dict[str, torch.Tensor]:
        graph = fxquant.convert(llama(), "w3+gptq", calibration=calibration, cache=folder / "cache")
        return graph.state_dict()

    def look() -> object:
        options = {"methods": ("alone",), "worst": 0, "output": folder / "store"}
        return explain(opt(), "w4", data=data, **options).sites  # type: ignore[arg-type]

    codes = fxquant.convert(llama(), "w3+gptq", calibration=calibration).state_dict()
    sites = explain(opt(), "w4", data=data, methods=("alone",), worst=0).sites
    hit = sum(killed(work, draw.uniform(0, 0.2)) for _ in range(kills) for work in (convert, look))
    print(f"{2 * kills} runs, {hit} of them killed, then finished")
    found = convert()
    assert all(torch.equal(found[name], value) for name, value in codes.items())
    assert look() == sites
    assert not list(folder.rglob("*.partial"))
    assert not list(folder.rglob(LOCK))


def test_killed_at_random_the_result_is_the_same(tmp_path: Path, seed_of: SeedOf) -> None:
    same_after_kills(tmp_path, 2, seed_of(SEED))


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path, seed_of: SeedOf) -> None:
    for seed in range(4):
        same_after_kills(tmp_path / str(seed), 5, seed_of(SEED) + seed)
