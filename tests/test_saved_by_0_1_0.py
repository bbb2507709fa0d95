"""Checkpoints that version 0.1.0 wrote: format version 1 stays readable, bit for bit."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fxquant
from fxquant.ir.graph import info
from tests.fixtures.make_saved import CASES, inputs

SAVED = Path(__file__).parent / "fixtures" / "saved-0.1.0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("saved")
    with tarfile.open(SAVED / "checkpoints.tar.xz") as archive:
        archive.extractall(target, filter="data")
    return target


@pytest.fixture(scope="module")
def logits() -> dict[str, Tensor]:
    return load_file(SAVED / "logits.safetensors")


def tensors(directory: Path) -> dict[str, Tensor]:
    return {k: v for p in directory.glob("*.safetensors") for k, v in load_file(p).items()}


@pytest.mark.parametrize("name", CASES)
def test_loads_and_saves_as_it_was(
    name: str, folder: Path, logits: dict[str, Tensor], tmp_path: Path
) -> None:
    """Nodes, names, tags, info and tensors are equal to the last bit on every machine.

    Logits are not: another processor's GEMM rounds otherwise, and where that turns a code, one
    step of a 4-bit cache is a fifteenth of a range. What a wrong operand gives is another
    distribution: a difference near or above the size of the logits.
    """
    graph = fxquant.load(folder / name)
    fxquant.save(graph, tmp_path / "again")
    before, after = (
        json.loads((d / "graph.json").read_text()) for d in (folder / name, tmp_path / "again")
    )
    assert _with_later_facts(_with_named_grids(before)) == after
    old, new = tensors(folder / name), tensors(tmp_path / "again")
    assert old.keys() == new.keys()
    for key, value in old.items():
        assert value.dtype == new[key].dtype, key
        assert torch.equal(value, new[key]), key
    with torch.no_grad():
        found = graph(**inputs())
    assert found.dtype == logits[name].dtype
    difference = (found - logits[name]).float().norm() / logits[name].float().norm()
    assert difference < (1e-4 if info(graph).scheme == "fp" else 0.1)


def _with_named_grids(graph: dict[str, Any]) -> dict[str, Any]:
    """What version 1 wrote as bits and symmetric is the name of a grid since; scales have a format,
    which was float32."""
    for module in graph["modules"].values():
        spec = module.get("options", {}).get("spec")
        if spec is not None:
            bits, symmetric = spec.pop("bits"), spec.pop("symmetric")
            spec["grid"] = f"int{bits}{'' if symmetric else '-asym'}"
            spec["scale"] = "fp32"
    return graph


_LATER = {"calibration": None, "weights": "", "frontend": ""}


def _with_later_facts(graph: dict[str, Any]) -> dict[str, Any]:
    """What version 1 did not know of a graph is said to be unknown."""
    assert not set(_LATER) & set(graph["info"])
    return {**graph, "info": {**graph["info"], **_LATER}}


def test_inputs_are_those_of_the_fixture(logits: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, logits[name]) for name, value in inputs().items())
