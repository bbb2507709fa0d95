"""The GPU benchmark goes through its steps without a GPU, and the parts that it is carried in."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import cuda, cuda_peers, cuda_table, pack, readme_tables
from tests.models import SMALL_OPT


def test_a_dry_run_measures_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.json"
    arguments = ["cuda", "--dry-run", "--model", str(SMALL_OPT), "--output", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    cuda.main()
    found = json.loads(out.read_text())
    assert found["dry_run"]
    rows = [row for each in found["figures"].values() if isinstance(each, list) for row in each]
    assert [row["scheme"] for row in rows] == list(cuda.SCHEMES)
    assert all(row["same bits"] for row in rows)
    for row in rows:
        levels = {"integer", "kernels", *({"kernels-inexact"} if "fp8" in row["scheme"] else ())}
        assert set(row["ratio"]) == levels
        assert ("difference" in row) == ("fp8" in row["scheme"])
    gemm = found["figures"]["gemm 17x64x32"]
    assert {"int_linear", "code_linear e4m3", "quantize_to e4m3"} <= set(gemm)
    assert set(found["figures"]["evaluate fp8"]) >= {"integer", "kernels", "kernels-inexact"}
    job = found["figures"]["evaluate w8a8-dynamic-token"]
    assert "replayed" not in job, "on the CPU nothing is captured"
    losses = [found["figures"]["evaluate w8a8-dynamic-token"][each]["loss"] for each in cuda.LEVELS]
    assert losses[0] == losses[1]
    assert "forward, a tiny OPT with random weights" in cuda_table.page_table(found)
    assert "a dry run on the CPU" in found["skipped"]["Triton's kernels"] or (
        "not installed" in found["skipped"]["Triton's kernels"]
    )


def test_what_the_time_does_not_hold_is_listed() -> None:
    found = cuda.measure(cuda.TINY, str(SMALL_OPT), minutes=0)
    assert not found["figures"]
    assert set(found["skipped"].values()) >= {"the time was up"}


def test_without_a_device_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["cuda"])
    with pytest.raises(SystemExit):
        cuda.main()
    assert "no CUDA device here" in capsys.readouterr().err


def test_parts_together_are_what_was_packed(tmp_path: Path) -> None:
    things = tmp_path / "things"
    things.mkdir()
    data = torch.randint(0, 256, (3000,), dtype=torch.uint8).numpy().tobytes()
    (things / "some.bin").write_bytes(data)
    parts = pack.pack(tmp_path / "parts", {"wheels": things}, 1000)
    sizes = [part.stat().st_size for part in parts]
    assert max(sizes) == 1000
    assert len(sizes) > 3
    lines = (tmp_path / "parts" / pack.SUMS).read_text().splitlines()
    for line, part in zip(lines, parts, strict=True):
        assert line == f"{hashlib.sha256(part.read_bytes()).hexdigest()}  {part.name}"
    whole = io.BytesIO(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(fileobj=whole) as archive:
        member = archive.extractfile("wheels/some.bin")
        assert member is not None
        assert member.read() == data


def test_links_are_packed_as_what_they_lead_to(tmp_path: Path) -> None:
    """As the hub's cache has them: what they lead to lies outside of what is packed."""
    blob, model = tmp_path / "blob", tmp_path / "model"
    blob.write_bytes(b"weights")
    model.mkdir()
    (model / "model.safetensors").symlink_to("../blob")
    parts = pack.pack(tmp_path / "parts", {"model": model}, 2**20)
    with tarfile.open(fileobj=io.BytesIO(parts[0].read_bytes())) as archive:
        packed = archive.getmember("model/model.safetensors")
        member = archive.extractfile(packed)
        assert packed.isreg()
        assert member is not None
        assert member.read() == b"weights"


def test_parts_are_in_order_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "file").write_bytes(bytes(20000))
    parts = pack.pack(tmp_path / "parts", {"some": tmp_path / "some"}, 17)
    assert len(parts) > 1000
    assert sorted(parts, key=str) == parts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["new", "--part", "0"], "1 MiB or more"),
        (["there"], "name a new folder"),
        (["new", "--wheels", "nowhere"], "--wheels nowhere is no folder"),
        (["new", "--model", "some/model"], "is no folder"),
        (["there/new", "--model", "there"], "packed into itself"),
        (["new", "--model", "lost"], "leads nowhere"),
        (["new", "--model", "linked"], "linked/in/weights is a link that leads nowhere"),
        (["new", "--model", "round"], "leads nowhere"),
    ],
)
def test_what_cannot_be_packed_is_said_before_any_work(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("lost").mkdir()
    Path("lost/weights").symlink_to("nothing")
    for name, leads in (("linked", "../lost"), ("round", "../round")):
        Path(name).mkdir()
        Path(name, "in").symlink_to(leads)
    monkeypatch.setattr(sys, "argv", ["pack", *arguments])
    with pytest.raises(SystemExit):
        pack.main()
    assert said in capsys.readouterr().err
    assert not Path("new").exists()
    assert not Path("there/new").exists()


def test_what_is_measured_is_on_the_disk_after_each_step() -> None:
    kept: list[tuple[int, int]] = []

    def keep(result: dict[str, Any]) -> None:
        assert json.dumps(result)
        kept.append((len(result["figures"]), len(result["skipped"])))

    cuda.measure(cuda.TINY, str(SMALL_OPT), minutes=0, keep=keep)
    steps = len(cuda.TINY.gemms) + len(cuda.SCHEMES) + len(cuda.JOBS) + len(cuda_peers.PEERS)
    assert len(kept) == steps
    assert [sum(each) for each in kept] == list(range(2, steps + 2))


def test_a_peer_is_measured_or_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cuda.opt_model(cuda.TINY)
    found: dict[str, Any] = {}
    for name in ("there", "missing", "broken"):
        report = cuda.Report(float("inf"))

        def change(model: nn.Module, name: str = name) -> nn.Module:
            if name == "missing":
                cuda_peers._imported("no_such_library")
            if name == "broken":
                raise AssertionError("another version")
            return model

        monkeypatch.setitem(cuda_peers.PEERS, name, change)
        report.step(name, functools.partial(cuda.peer, name, model, cuda.TINY))
        found[name] = report
    assert "not installed" in found["missing"].skipped["missing"]
    assert found["broken"].skipped["broken"] == "fails here: AssertionError: another version"
    (row,) = found["there"].figures["there"]
    assert row["ratio"]["peer"] == row["ms"]["peer"] / row["ms"]["eager"]
    assert row["seconds to the first result"] > 0


def test_readmes_table_is_that_of_the_file(tmp_path: Path) -> None:
    place = tmp_path / "cuda.json"
    assert "Not measured" in readme_tables.table_of(place)
    row = {"scheme": "w8", "batch": 4, "length": 2048, "ratio": {"integer": 2, "kernels": 1.25}}
    ratios = {"integer": 2, "kernels": 1.25, "kernels-inexact": 0.75}
    fp8 = {**row, "scheme": "fp8", "ratio": ratios}
    peer = {"scheme": "another", "batch": 1, "length": 2048, "ratio": {"peer": 0.5}}
    job = {"scheme": "fp", "integer": {"seconds": 2.5}, "kernels": {"seconds": 2.25}}
    figures = {"w8": [{**row, "same bits": False}, fp8], "p": [peer], "evaluate fp": job}
    made = {"device": "some GPU", "dtype": "torch.float16", "rounds": 7, "model": "some"}
    rest = {"versions": {"torch": "2"}, "dry_run": False, "figures": figures}
    place.write_text(json.dumps({**made, **rest, "skipped": {"this": "for that"}}))
    table = readme_tables.table_of(place)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert ["w8", "4×2048", "2.00", "1.25", "", "", "NO"] in cells
    assert ["fp8", "4×2048", "2.00", "1.25", "0.75", "", ""] in cells
    assert ["another", "1×2048", "", "", "", "0.50", ""] in cells
    assert ["fp", "2.50", "2.25", "", ""] in cells
    assert "some GPU" in table
    assert "Skipped: this: for that" in table
