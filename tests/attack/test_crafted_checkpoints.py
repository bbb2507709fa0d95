"""Checkpoints crafted to run a command, to take for ever, or to read what is not theirs."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fxquant
from fxquant.checkpoint.manifest import is_checkpoint
from fxquant.cli.main import main
from fxquant.errors import CheckpointError
from fxquant.ir.graph import info, is_op
from fxquant.ir.legal_forms import OPS
from tests.architectures import llama, token_ids
from tests.attack.mutations import sign, write
from tests.attack.watch import foreign_reads, watched

Data = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("crafted") / "saved"
    model = llama(num_hidden_layers=1)
    calibration = [token_ids(2, 12, seed=3)]
    graph = fxquant.convert(model, "w4-g16-asym/a8-static-asym:absmax", calibration=calibration)
    fxquant.save(graph, directory)
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def behind_inputs(*nodes: list[Any]) -> Callable[[Data, Path], None]:
    def change(data: Data, canary: Path) -> None:
        text = json.dumps([[*node, {}, {}] for node in nodes]).replace("CANARY", str(canary))
        data["nodes"][2:2] = json.loads(text)

    return change


def named_self(data: Data, canary: Path) -> None:
    """A node called ``self`` turns ``self.X`` of generated code into reads of that node's value."""
    module = {"kind": "Module", "tensors": {"get": "none buffer"}}
    for path in ("split", "split.__globals__"):
        data["modules"][path] = module
    command = f"__import__('os').system('touch {canary}')"
    behind_inputs(
        ["call_method", "self", "float", [{"node": "input_ids"}]],
        ["get_attr", "found", "split.__globals__.get", []],
        ["call_function", "run", "operator.getitem", [{"node": "found"}, "eval"]],
        ["call_module", "called", "split", [command]],
    )(data, canary)


def renamed(name: str) -> Callable[[Data, Path], None]:
    def change(data: Data, _: Path) -> None:
        node = next(node for node in data["nodes"] if node[1].endswith("q_proj_x_q"))
        text = json.dumps(data["nodes"]).replace(json.dumps(node[1]), json.dumps(name))
        data["nodes"] = json.loads(text)

    return change


def module_at(path: str) -> Callable[[Data, Path], None]:
    def change(data: Data, _: Path) -> None:
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            data["modules"].setdefault(".".join(parts[:end]), {"kind": "Module"})

    return change


IDS = {"node": "input_ids"}
CRAFTED: dict[str, tuple[Callable[[Data, Path], None], str]] = {
    "node self": (named_self, "'self'"),
    **{
        f"node {name}": (renamed(name), "has a meaning")
        for name in ("self", "torch", "inf", "device", "print", "lambda", "__class__", "pytree")
    },
    **{
        f"path {path}": (module_at(path), "has a meaning")
        for path in ("split.__globals__.get", "forward", "print", "a.class", "graph", "a.training")
    },
    "pow": (
        behind_inputs(["call_function", "bomb", "operator.pow", [10, 10**8]]),
        r"bomb: call_function .*pow",
    ),
    "pow of a node": (
        behind_inputs(
            ["call_method", "extent", "size", [IDS, 1]],
            ["call_function", "many", "operator.pow", [{"node": "extent"}, 60]],
            ["call_function", "bomb", "operator.pow", [{"node": "many"}, 60]],
        ),
        "node many: .*pow",
    ),
    "shift": (
        behind_inputs(["call_function", "bomb", "operator.lshift", [1, 10**9]]),
        "bomb",
    ),
    "list": (behind_inputs(["call_function", "bomb", "operator.mul", [[0], 10**9]]), "bomb"),
    "text": (behind_inputs(["call_function", "bomb", "operator.mul", ["a", 10**9]]), "the text"),
    "zeros": (behind_inputs(["call_function", "bomb", "torch.zeros", [10**12]]), "elements"),
    "repeat": (behind_inputs(["call_method", "bomb", "repeat", [IDS, 10**4, 10**4]]), "elements"),
    "repeated": (
        behind_inputs(
            ["call_method", "some", "repeat", [IDS, 10**3, 10**3]],
            ["call_method", "bomb", "repeat", [{"node": "some"}, 10**3, 10**3]],
        ),
        "bomb.*elements",
    ),
    "write to the input": (
        behind_inputs(["call_function", "put", "operator.setitem", [IDS, 0, 1]]),
        "writes into",
    ),
    "write to a weight": (
        behind_inputs(
            ["get_attr", "w", "model.norm.weight", []],
            ["call_function", "put", "operator.setitem", [{"node": "w"}, 0, 1.0]],
        ),
        "writes into",
    ),
    "method of a number": (
        behind_inputs(
            ["call_method", "extent", "size", [IDS, 1]],
            ["call_method", "put", "to", [{"node": "extent"}, 1]],
        ),
        "no tensor",
    ),
    "bound method": (
        behind_inputs(["call_function", "put", "getattr", [IDS, "max"]]),
        "no tensor and no number",
    ),
    "device text": (behind_inputs(["call_method", "moved", "to", [IDS, "cuda"]]), "the text"),
    "out": (
        lambda data, _: next(n for n in data["nodes"] if n[2] == "torch.rsqrt")[4].update(out=IDS),
        "no operation has an argument 'out'",
    ),
    "later node": (
        lambda data, _: data["nodes"][2][3].__setitem__(0, {"node": data["nodes"][9][1]}),
        "not understood",
    ),
    "control characters": (
        lambda data, _: data["info"].update(model="\x1b]0;owned\x07"),
        "control characters",
    ),
    "surrogate": (lambda data, _: data["info"].update(model="\ud800"), "half a character"),
    "vocabulary": (lambda data, _: data["info"].update(vocab_size=10**6), "rows"),
    "site": (
        lambda data, _: data["info"]["sites"][0].update(path="a.__class__"),
        "has a meaning",
    ),
    "quantize range": (
        lambda data, _: next(n for n in data["nodes"] if "quantize." in n[2])[3].__setitem__(
            4, 300
        ),
        "no range of 2 to 8 bits",
    ),
    "group size": (
        lambda data, _: next(n for n in data["nodes"] if "grouped" in n[2])[3].__setitem__(6, 32),
        "groups|cannot be computed",
    ),
    "spec": (
        lambda data, _: data["info"]["site_records"][0].update(spec="w3-g16-asym"),
        "its record says w3-g16-asym, by scheme",
    ),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_graphs_are_refused_before_they_run(name: str, copy: Path) -> None:
    change, message = CRAFTED[name]
    canary = copy.parent / "canary"
    data = json.loads((copy / "graph.json").read_text())
    change(data, canary)
    write(copy, data)
    with watched(copy) as seen, pytest.raises(CheckpointError, match=message):
        fxquant.load(copy)
    assert not seen
    assert not canary.exists()


def changed(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """A stored tensor whose path ends in ``name`` replaced, and everything signed again."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for key in tensors:
            if key.endswith(name):
                tensors[key] = change(tensors[key].clone()).contiguous()
                save_file(tensors, path)
                sign(folder)
                return
    raise AssertionError(f"no tensor {name}")


def fill(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill_(0, torch.tensor([0]), value)


VALUES: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "scale 0": ("weight_scale", fill(0.0), "positive"),
    "scale negative": ("weight_scale", fill(-1.0), "positive"),
    "scale infinite": ("weight_scale", fill(float("inf")), "finite"),
    "scale NaN": ("weight_scale", fill(float("nan")), "finite"),
    "scale double": ("weight_scale", lambda scale: scale.double(), "float32"),
    "scales turned": ("weight_scale", lambda scale: scale.t(), "cannot be computed"),
    "input scale 0": ("input_scale", torch.zeros_like, "positive"),
    "input zero point": ("input_zero_point", lambda zero: zero + 1000, "within"),
    "weight zero point": ("weight_zero_point", fill(99), "within -8..7"),
    "sums": ("weight_sum", fill(12345), "sums of the codes"),
    "codes int8": ("q_proj.weight", lambda codes: codes.to(torch.int8), "uint8"),
    "codes cut": ("q_proj.weight", lambda codes: codes[:, :-1], "cannot be computed"),
    "gain NaN": ("model.norm.weight", fill(float("nan")), "finite"),
    "gain cut": ("model.norm.weight", lambda gain: gain[:-1], "cannot be computed"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_no_pass_leaves_are_refused(name: str, copy: Path) -> None:
    tensor, change, message = VALUES[name]
    changed(copy, tensor, change)
    with pytest.raises(CheckpointError, match=message):
        fxquant.load(copy)
    with pytest.raises(CheckpointError, match=message):
        fxquant.load(copy, stream=True)


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w5", "w3"])
def test_codes_out_of_the_recorded_range_are_refused(scheme: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    fxquant.save(fxquant.convert(llama(num_hidden_layers=1), scheme), folder)
    changed(folder, "q_proj.weight", fill(0x88 if scheme == "w3" else -128))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: expected codes within"):
        fxquant.load(folder)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_a_rotation_has_finite_frequencies(value: float, tmp_path: Path) -> None:
    fxquant.save(fxquant.trace(llama()), tmp_path / "saved")
    changed(tmp_path / "saved", "inv_freq", lambda found: found * value)
    with pytest.raises(CheckpointError, match=r"inv_freq: expected finite numbers"):
        fxquant.load(tmp_path / "saved")


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-dynamic"])
@pytest.mark.parametrize("ends", [(-8, 7), (-128, 127)])
def test_a_range_of_another_spec_is_refused(
    scheme: str, ends: tuple[int, int], tmp_path: Path
) -> None:
    batches = [token_ids(2, 8, seed) for seed in (1, 2)]
    graph = fxquant.convert(llama(), scheme, calibration=batches)
    for node in graph.graph.nodes:
        if is_op(node, OPS.quantize.default):
            low, high = node.args.index(-127), node.args.index(127)
            node.update_arg(low, ends[0])
            node.update_arg(high, ends[1])
    with pytest.raises(CheckpointError, match=r"proj: codes .* of its input, which is not what"):
        fxquant.save(graph, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def linked(folder: Path, name: str) -> None:
    outside = folder.parent / f"outside-{name}"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)


def piped(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is not among"),
    "hidden": (lambda f: (f / ".DS_Store").write_text("x"), "DS_Store is not among"),
    "deeper": (
        lambda f: shutil.copytree(f, f / "a"),
        "is not among",
    ),
    "unlisted link": (lambda f: (f / "vocab.txt").symlink_to("/etc/passwd"), "is not among"),
    "linked folder": (lambda f: (f / "more").symlink_to(f.parent), "more is not among"),
    "pipe": (lambda f: os.mkfifo(f / "pipe"), "pipe is not among"),
    "graph is a link": (lambda f: linked(f, "graph.json"), "no regular file"),
    "weights are a link": (lambda f: linked(f, "weights-00000.safetensors"), "no regular file"),
    "graph is a pipe": (lambda f: piped(f, "graph.json"), "no regular file"),
    "manifest is a link": (lambda f: linked(f, "manifest.json"), "no regular file"),
    "manifest is a pipe": (lambda f: piped(f, "manifest.json"), "no regular file"),
    "no graph": (lambda f: (f / "graph.json").unlink(), "graph.json is damaged .* missing"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_manifest_is_the_folder(name: str, copy: Path) -> None:
    change, message = FOLDERS[name]
    change(copy)
    with watched(copy, seconds=20), pytest.raises(CheckpointError, match=message):
        fxquant.load(copy)


def test_a_pipe_for_a_manifest_is_no_checkpoint(copy: Path) -> None:
    piped(copy, "manifest.json")
    with watched(copy, seconds=20):
        assert not is_checkpoint(copy)
    assert main(["evaluate", "--model", str(copy), "--schemes", "w8"]) == 2


def test_names_of_a_file_stay_out_of_its_code_and_in_its_printouts(saved: Path) -> None:
    graph = fxquant.load(saved)
    assert not foreign_reads(graph)
    names = [node.name for node in graph.graph.nodes]
    assert "model_layers_0_self_attn_q_proj_x_q" in names
    assert not any(name in graph.code for name in names if "proj" in name)
    assert "q_proj" in str(fxquant.inspect(graph))
    assert info(graph).history
