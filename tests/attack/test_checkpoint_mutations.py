"""Altered checkpoints: refused, or the graph as saved, or a graph that only computes."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

import fxquant
from fxquant.errors import CheckpointError, NonFiniteError
from fxquant.evaluation import evaluate
from tests.attack.mutations import mutate
from tests.attack.watch import foreign_reads, watched
from tests.fixtures.make_saved import inputs

SAVED = Path(__file__).parents[1] / "fixtures" / "saved-0.1.0" / "checkpoints.tar.xz"
BASES = (
    *("llama-two-layers", "opt-head", "llama-gptq-float", "llama-attn8", "llama-rotate", "gpt2"),
    *("llama-outliers", "llama-awq", "opt-insert", "llama-kv4"),
)
SHORT, LONG = 100, 2000


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bases")
    with tarfile.open(SAVED) as archive:
        archive.extractall(target, filter="data")
    fxquant.load(target / BASES[0])  # imports what is imported late
    return target


def outcome(folder: Path, expected: torch.Tensor) -> str:
    """What became of the checkpoint; AssertionError if it did what it may not."""
    gm, refusal = None, str(folder)
    with watched(folder) as seen:
        try:
            gm = fxquant.load(folder)
        except CheckpointError as error:
            refusal = str(error)
        result = "refused" if gm is None else run(gm, expected)
    assert str(folder) in refusal, f"the error does not name the folder: {refusal}"
    assert not seen, f"forbidden: {seen[:4]}"
    return result


@torch.no_grad()
def run(gm: GraphModule, expected: torch.Tensor) -> str:
    assert not foreign_reads(gm), f"the code reads {foreign_reads(gm)[:4]}"
    state = {key: value.clone() for key, value in gm.state_dict().items()}
    found = gm(**inputs())
    after = gm.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in state.items()), "state changed"
    if torch.equal(found, expected):
        return "as saved"
    if bool(found.isfinite().all()):
        return "finite"
    with pytest.raises(NonFiniteError):
        evaluate(gm, inputs()["input_ids"])
    return "one clear error when run"


def check(seeds: range, bases: Path, tmp_path: Path) -> Counter[str]:
    results: Counter[str] = Counter()
    wrong: list[str] = []
    expected = {}
    for base in BASES:
        with torch.no_grad():
            expected[base] = fxquant.load(bases / base)(**inputs())
    for seed in seeds:
        base = BASES[seed % len(BASES)]
        folder = tmp_path / "case" / base
        shutil.copytree(bases / base, folder)
        changes = mutate(seed, folder)
        try:
            results[outcome(folder, expected[base])] += 1
        except Exception as error:
            wrong.append(f"seed {seed} ({base}, {changes}): {type(error).__name__}: {error}")
        shutil.rmtree(tmp_path / "case")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(seeds)} wrong; {dict(results)}", *wrong])
    return results


def test_altered_checkpoints_are_refused_or_compute(bases: Path, tmp_path: Path) -> None:
    results = check(range(SHORT), bases, tmp_path)
    assert results["refused"] > SHORT // 2


@pytest.mark.slow
def test_many_altered_checkpoints_are_refused_or_compute(bases: Path, tmp_path: Path) -> None:
    start = int(os.environ.get("FXQUANT_SEED", SHORT))
    results = check(range(start, start + LONG), bases, tmp_path)
    print(f"seeds {start}..{start + LONG - 1}: {dict(results)}")
    assert results["refused"] > LONG // 2
