"""Saved graphs whose files change while they are read, by links, odd names and few open files."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.checkpoint.target import held_target
from fxquant.cli.main import main
from fxquant.errors import CheckpointError
from tests.architectures import opt, token_ids
from tests.attack.test_disk import small_disk

IDS = token_ids(2, 9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("changing") / "saved"
    fxquant.save(fxquant.convert(opt(), "w8"), directory)
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def cut(path: Path) -> None:
    os.truncate(path, 4096)


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes(8))
    os.utime(path, ns=(0, 0))  # a clock that is coarse does not tell two writes apart


@pytest.mark.parametrize("change", [cut, rewrite])
def test_files_that_are_written_to_are_not_read_on(change: object, copy: Path) -> None:
    graph = fxquant.load(copy, stream=True)
    for path in copy.glob("*.safetensors"):
        change(path)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=r"safetensors was written to while it was being"):
        graph(IDS)


def test_a_folder_that_is_saved_over_is_read_on(copy: Path) -> None:
    """Files are replaced, never written to: those that are mapped stay."""
    graph, whole = fxquant.load(copy, stream=True), fxquant.load(copy)
    fxquant.save(fxquant.convert(opt(seed=3), "w4"), copy)
    assert torch.equal(graph(IDS), whole(IDS))
    assert not torch.equal(fxquant.load(copy)(IDS), whole(IDS))


@pytest.mark.parametrize("name", ["a\nfxquant: all is well", "\x1b]0;owned\x07", "\u202egnp.x"])
def test_names_of_files_reach_no_terminal(
    name: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / name).write_text("x")
    with pytest.raises(CheckpointError, match="is not among the files") as raised:
        fxquant.load(copy)
    assert str(raised.value).isprintable()
    assert main(["inspect", "--model", str(copy)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.isprintable()


@contextlib.contextmanager
def few_files(more: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    free = [number for number in range(len(used) + more + 1) if number not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[more], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("more", [0, 1, 2])
def test_too_many_open_files_is_what_is_said(more: int, copy: Path) -> None:
    with few_files(more), pytest.raises(CheckpointError, match="Too many open files") as raised:
        fxquant.load(copy)
    assert "is not a readable safetensors" not in str(raised.value)
    assert torch.equal(fxquant.load(copy)(IDS), fxquant.load(copy)(IDS))


# --- an output by another name --------------------------------------------------------------------


def test_a_link_leads_to_where_a_graph_is_saved(tmp_path: Path) -> None:
    graph = fxquant.convert(opt(), "w8")
    for name in ("there", "not there"):
        link, place = tmp_path / f"link {name}", tmp_path / name
        link.symlink_to(place)
        if name == "there":
            place.mkdir()
        for _ in range(2):
            fxquant.save(graph, link)
            assert link.is_symlink()
            assert torch.equal(fxquant.load(place)(IDS), graph(IDS))
    assert len(list(tmp_path.iterdir())) == 4


def test_a_link_to_another_file_system(tmp_path: Path) -> None:
    graph = fxquant.convert(opt(), "w8")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "saved")
    with small_disk(tmp_path / "disk", "10m"):
        for _ in range(2):
            fxquant.save(graph, tmp_path / "link")
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["saved"]
        assert torch.equal(fxquant.load(tmp_path / "disk" / "saved")(IDS), graph(IDS))


def test_a_folder_by_two_names_has_one_writer(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for first, second in (("real", "link"), ("link", "real"), ("link", "link")):
        with (
            held_target(tmp_path / first),
            pytest.raises(CheckpointError, match="another process is writing"),
            held_target(tmp_path / second),
        ):
            pass


def test_links_in_a_circle_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match=r"loop.*cannot be used"):
        fxquant.save(fxquant.convert(opt(), "w8"), tmp_path / "loop")
