"""The GPU benchmark goes through its steps without a GPU, and the parts that it is carried in."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import cuda, pack
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
    losses = [found["figures"]["evaluate w8a8-dynamic-token"][each]["loss"] for each in cuda.LEVELS]
    assert losses[0] == losses[1]
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
