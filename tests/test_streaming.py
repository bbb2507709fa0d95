"""Streamed models: the same bits as in memory, each leaf read once for all batches."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM

import fxquant
from fxquant.cli.main import main
from fxquant.errors import ModelError, NonFiniteError
from fxquant.evaluation.perplexity import evaluate
from fxquant.files.tensor_file import TensorFile
from fxquant.frontends.streaming import stream
from fxquant.frontends.tracing import trace
from fxquant.ir.graph import info, set_workspace
from fxquant.ir.sources import Source
from fxquant.ir.streamed import Workspace
from fxquant.passes import Calibrate, NameSites, Observe
from fxquant.pipeline.context import Context
from fxquant.schemes.scheme import Scheme
from tests.architectures import ARCHITECTURES, opt, padding_mask, token_ids
from tests.models import SMALL_OPT
from tests.more_architectures import MORE
from tests.pickles import save_pickled

INPUTS = {"input_ids": token_ids(3, 14), "attention_mask": padding_mask(3, 14, "both")}
SCHEMES = ("fp32-gemm", "w8", "w8a8-dynamic", "w4-g16/a8-static-asym:absmax")
USUAL = ("opt", "gpt2", "gemma3", "bloom")
REPAIRED = ("w4-g16+gptq", "w4/a8-dynamic+awq", "w4+equalize+clip+refine")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A post-LayerNorm OPT on disk: its hidden states are quantized across block borders."""
    directory = tmp_path_factory.mktemp("stored")
    model = opt(do_layer_norm_before=False, word_embed_proj_dim=16, num_hidden_layers=3)
    model.to(torch.float16).save_pretrained(directory)
    return directory


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor is read from a file."""
    counter: Counter[str] = Counter()
    read = TensorFile.read

    def counted(self: TensorFile, name: str, dtype: torch.dtype | None = None) -> Tensor:
        counter[name] += 1
        return read(self, name, dtype)

    monkeypatch.setattr(TensorFile, "read", counted)
    return counter


@pytest.mark.parametrize(
    "architecture",
    [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES],
)
def test_traced_on_meta_it_computes_the_same_bits(architecture: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[architecture]().to(torch.float16)
    model.save_pretrained(tmp_path)
    attention = model.config._attn_implementation
    whole = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation=attention
    )
    streamed = stream(tmp_path, dtype=torch.float32, attention=attention)
    assert all(parameter.is_meta for parameter in streamed.parameters())
    expected, found = trace(whole), trace(streamed)
    assert all(parameter.is_meta for parameter in found.parameters())
    with torch.no_grad():
        assert torch.equal(expected(**INPUTS), found(**INPUTS))


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe", "gpt-oss"])
def test_experts_are_read_where_they_lie(
    name: str, reads: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5 fuses them, and GPT-OSS's are fused in the file."""
    parts: Counter[tuple[str, int]] = Counter()
    read_part = TensorFile.read_part

    def counted(self: TensorFile, key: str, part: int, dtype: torch.dtype | None = None) -> Tensor:
        parts[key, part] += 1
        return read_part(self, key, part, dtype)

    monkeypatch.setattr(TensorFile, "read_part", counted)
    MORE[name]().to(torch.float16).save_pretrained(tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    streamed = stream(tmp_path / "model", dtype=torch.float32)
    assert all(parameter.is_meta for parameter in streamed.parameters())
    expected, found = trace(whole), trace(streamed)
    assert all(parameter.is_meta for parameter in found.parameters())
    reads.clear()
    parts.clear()
    with torch.no_grad():
        assert torch.equal(expected(**INPUTS), found(**INPUTS))
    assert set(reads.values()) | set(parts.values()) == {1}
    calibration = [INPUTS["input_ids"]]
    one, other = (
        fxquant.convert(graph, "w4-g16/a8-static+gptq", calibration=calibration)
        for graph in (expected, found)
    )
    with torch.no_grad():
        assert torch.equal(one(**INPUTS), other(**INPUTS))
    fxquant.save(found, tmp_path / "saved")  # the float graph, each expert in its place
    with torch.no_grad():
        assert torch.equal(fxquant.load(tmp_path / "saved")(**INPUTS), expected(**INPUTS))


def in_memory(directory: Path) -> GraphModule:
    return trace(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))


@pytest.mark.parametrize(
    ("scheme", "spill"),
    [
        *((s, True) for s in ("w8a8-static", *REPAIRED)),
        ("w8a8-static", False),
        *(pytest.param(s, True, marks=pytest.mark.slow) for s in SCHEMES),
        pytest.param("w8", False, marks=pytest.mark.slow),
    ],
)
def test_converted_and_evaluated_to_the_same_bits(
    stored: Path, scheme: str, spill: bool, tmp_path: Path
) -> None:
    calibration = [{"input_ids": INPUTS["input_ids"], "attention_mask": INPUTS["attention_mask"]}]
    calibration += [{"input_ids": token_ids(2, 9, seed=5)}]
    windows = token_ids(4, 20, seed=2)
    expected = fxquant.convert(in_memory(stored), scheme, calibration=calibration)
    graph = trace(stream(stored, dtype=torch.float32))
    if spill:
        set_workspace(graph, Workspace(tmp_path, smallest=64))
    found = fxquant.convert(graph, scheme, calibration=calibration)
    if spill:
        assert list(tmp_path.glob("*.safetensors"))
        codes = {n: b for n, b in found.named_buffers() if n.endswith(".weight")}
        assert all(b.is_meta for b in codes.values())
    one, other = (evaluate(gm, windows, batch_size=2) for gm in (expected, found))
    assert torch.equal(one.losses, other.losses)
    assert one.share_clipped == other.share_clipped
    fxquant.save(found, tmp_path / "saved")
    loaded = fxquant.load(tmp_path / "saved")
    assert info(loaded).sites == info(expected).sites
    assert torch.equal(evaluate(loaded, windows, batch_size=2).losses, one.losses)


def test_a_rotated_table_goes_to_the_workspace(tmp_path: Path) -> None:
    """OPT's positions are looked up by a function: their table is a leaf like any other."""
    opt().save_pretrained(tmp_path / "model")
    expected = fxquant.convert(in_memory(tmp_path / "model"), "fp+rotate")
    graph = trace(stream(tmp_path / "model", dtype=torch.float32))
    (tmp_path / "work").mkdir()
    set_workspace(graph, Workspace(tmp_path / "work", smallest=64))
    rotated = fxquant.convert(graph, "fp+rotate")
    path = "model.decoder.embed_positions"
    assert rotated.get_submodule(path)._parameters["weight"].is_meta  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(rotated(**INPUTS), expected(**INPUTS))


def test_each_leaf_is_read_once_for_all_batches(stored: Path, reads: Counter[str]) -> None:
    graph = trace(stream(stored, dtype=torch.float32))
    observed = Observe()(NameSites()(graph), Context(Scheme.parse("w8a8-static")))
    reads.clear()
    evaluate(graph, token_ids(5, 12))
    # The token embedding is the tied head too: it is used at both ends.
    assert max(reads.values()) == 2
    assert [name for name, count in reads.items() if count > 1] == [
        "model.decoder.embed_tokens.weight"
    ]
    reads.clear()
    Calibrate().rewrite(observed, Context(batches=token_ids(5, 12).split(1)))
    assert set(reads.values()) == {1}


def test_blocks_are_let_go_in_turn(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace(stream(stored, dtype=torch.float32))
    blocks = info(graph).blocks
    most = 0
    read = Source.read

    def counted(self: Source) -> Tensor:
        nonlocal most
        held = {p for p, m in graph.named_modules() if m.__dict__.get("_held")}
        most = max(most, sum(any(p.startswith(f"{b}.") for p in held) for b in blocks))
        return read(self)

    monkeypatch.setattr(Source, "read", counted)
    evaluate(graph, token_ids(3, 12))
    assert most == 1
    assert not any(m.__dict__.get("_held") for m in graph.modules())


def test_a_streamed_model_cannot_be_moved(stored: Path) -> None:
    for streamed in (stream(stored), trace(stream(stored))):
        with pytest.raises(ModelError, match="open it again"):
            streamed.half()


def test_a_replaced_parameter_is_not_read_from_the_file(stored: Path) -> None:
    graph = trace(stream(stored))
    leaf = copy.copy(graph.get_submodule("model.decoder.layers.0.fc1"))
    leaf._parameters = {**leaf._parameters, "weight": nn.Parameter(torch.ones(64, 32))}
    assert torch.equal(leaf.get_parameter("weight"), torch.ones(64, 32))
    assert leaf.get_parameter("bias").device.type == "cpu"


def test_stored_dtype_is_the_default(stored: Path) -> None:
    graph = trace(stream(stored, dtype=torch.bfloat16))
    assert graph(**INPUTS).dtype == torch.bfloat16
    assert {p.dtype for p in stream(stored).parameters()} == {torch.float16}


def test_sharded_files_and_files_without_the_prefix(tmp_path: Path) -> None:
    model = opt()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    model.model.save_pretrained(tmp_path / "headless")
    with torch.no_grad():
        expected = trace(model)(**INPUTS)
        for name in ("sharded", "headless"):
            assert torch.equal(expected, trace(stream(tmp_path / name))(**INPUTS))


def test_missing_misshapen_and_damaged_weights_are_named(tmp_path: Path) -> None:
    save_pickled(opt(), tmp_path / "bin")
    with pytest.raises(ModelError, match="no safetensors"):
        stream(tmp_path / "bin")
    opt().save_pretrained(tmp_path / "good")
    path = tmp_path / "good" / "model.safetensors"
    tensors = load_file(path)
    name = "model.decoder.layers.1.fc1.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    with pytest.raises(ModelError, match=f"lacks weights.*{name}"):
        stream(tmp_path / "good")
    save_file({**tensors, name: tensors[name][:5].clone()}, path)
    with pytest.raises(ModelError, match=r"fc1\.weight has shape \[5, 32\]"):
        stream(tmp_path / "good")
    tensors[name][3, 3] = float("nan")
    save_file(tensors, path)
    with pytest.raises(NonFiniteError, match=name):
        trace(stream(tmp_path / "good"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        stream(tmp_path / "good")


def test_evaluate_streams_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(SMALL_OPT), "--schemes", "w8a8-static", "--windows", "2"]
    options += ["--length", "48", "--calibration-windows", "2", "--output"]
    assert main(["evaluate", *options, str(tmp_path / "whole")]) == 0
    assert main(["evaluate", *options, str(tmp_path / "streamed"), "--stream"]) == 0
    whole, streamed = (
        [row["loss"] for row in json.loads((tmp_path / name / "results.json").read_text())["rows"]]
        for name in ("whole", "streamed")
    )
    assert whole == streamed
    assert main(["evaluate", *options, str(tmp_path / "hub"), "--stream", "--model", "a/b"]) == 2
    assert "a/b is no directory" in capsys.readouterr().err
