"""compressed-tensors checkpoints: what stands in them, and that transformers computes the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import fxquant
from fxquant.errors import ExportError, ModelError
from fxquant.exports import compressed_file, compressed_rules, compressed_tensors
from fxquant.exports.compressed_file import pack
from fxquant.exports.sites import CodedSite, coded_sites
from fxquant.files.doors import door
from fxquant.ir.graph import info, update_info
from tests.architectures import build, gpt2, randomize
from tests.environments import TRANSFORMERS_5
from tests.models import SMALL_OPT, small_opt
from tests.more_architectures import MORE

ENGINE = pytest.mark.needs_program(
    find_spec("compressed_tensors"), "compressed-tensors, of the exports extra"
)
WEIGHTS = (
    "w8", "w4", "w3", "w6-asym", "w4-g32", "w4-g32-asym", "w8-g16-asym", "w8-tensor",
    "w8-tensor-asym", "w4-g128", "w4-g32+gptq", "w4+awq", "w8+equalize",
)  # fmt: skip
INPUTS = (
    "w8a8-static", "w8a8-static-asym:absmax", "w8a8-dynamic", "w8a8-dynamic-token",
    "w8a8-dynamic-token-asym", "w8-asym/a8-dynamic-token", "w4-g32/a8-dynamic-token",
    "w8a8-static+smooth",
)  # fmt: skip
MIXED = {
    "scheme": "w4-g32",
    "overrides": {"*.layers.0.*": "w8", "*.layers.1.*_proj": "w8a8-dynamic-token", "head": "w8"},
}


def tiny_llama(
    tied: bool = True, dtype: torch.dtype = torch.float32, inner: int = 96
) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=inner, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = build(LlamaForCausalLM, config)
    randomize(model, 3)
    return model.to(dtype)


@pytest.fixture(scope="module", params=["llama", pytest.param("opt", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_llama() if request.param == "llama" else small_opt()[0]


def batches(model: PreTrainedModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, model.config.vocab_size, (2, 16), generator=generator)] * 2


def fresh_tokens(model: PreTrainedModel) -> Tensor:
    return torch.randint(3, model.config.vocab_size, (2, 21))


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@ENGINE
@pytest.mark.parametrize("scheme", WEIGHTS)
def test_weights_give_the_logits_of_level_qdq(
    model: PreTrainedModel, scheme: str, tmp_path: Path
) -> None:
    calibration = batches(model)
    exported = compressed_tensors(model, tmp_path / "out", scheme=scheme, calibration=calibration)
    graph = fxquant.convert(model, scheme, calibration=calibration, level="qdq")
    ids = fresh_tokens(model)
    with torch.no_grad():
        expected, found = graph(input_ids=ids), loaded(exported.path)(ids).logits
    # One rounding of a sum of at most 512 products is all that may differ.
    assert float((found - expected).abs().max()) <= 2e-6 * float(expected.abs().max())
    assert "compressed-tensors" in exported.checked.engine


@ENGINE
@pytest.mark.parametrize("scheme", INPUTS)
def test_inputs_follow_the_rules_of_the_engine(
    model: PreTrainedModel, scheme: str, tmp_path: Path
) -> None:
    found = compressed_tensors(
        model, tmp_path / "out", scheme=scheme, calibration=batches(model)
    ).checked
    assert found.under_rules <= 1e-6 * found.largest
    if "asym" not in scheme or "w8-asym" in scheme:  # whose codes reach further there
        assert found.difference > 1e-4 * found.largest
        assert "symmetric codes reach -128 there" in found.cause
    assert f"{found.difference:.3g}" in str(found)


@ENGINE
def test_norms_that_were_folded_do_nothing(tmp_path: Path) -> None:
    found = compressed_tensors(tiny_llama(), tmp_path / "out", scheme="w8+rotate(online=false)")
    assert found.checked.under_rules <= 2e-6 * found.checked.largest
    assert json.loads((found.path / "config.json").read_text())["tie_word_embeddings"] is False
    gains = load_file(found.path / "model.safetensors")["model.norm.weight"]
    assert torch.equal(gains, torch.ones(64))


@ENGINE
@pytest.mark.parametrize("scheme", ["w4-g32-asym", "w8a8-dynamic-token"])
def test_biases_and_inputs_without_a_batch(scheme: str, tmp_path: Path) -> None:
    """OPT's second half of a block gives its linears [tokens, K]."""
    found = compressed_tensors(small_opt()[0], tmp_path / "out", scheme=scheme).checked
    assert found.under_rules <= 1e-6 * found.largest
    assert ("an input [tokens, K] has one scale there" in found.cause) is ("a8" in scheme)


@ENGINE
@pytest.mark.skipif(TRANSFORMERS_5, reason="experts of one parameter there are no linears")
@pytest.mark.parametrize("name", ["mixtral", "olmoe"])  # one calls experts without tokens too
@pytest.mark.parametrize("scheme", ["w8a8-dynamic-token", "w8a8-dynamic"])
def test_an_expert_sees_the_tokens_that_are_routed_to_it(
    name: str, scheme: str, tmp_path: Path
) -> None:
    found = compressed_tensors(MORE[name](), tmp_path / "out", scheme=scheme).checked
    assert found.under_rules <= 1e-6 * found.largest
    assert "an expert's range is of the tokens that are routed to it there" in found.cause


@ENGINE
def test_overrides_and_a_coded_head(model: PreTrainedModel, tmp_path: Path) -> None:
    found = compressed_tensors(model, tmp_path / "out", scheme=MIXED)
    assert found.checked.under_rules <= 1e-6 * found.checked.largest
    config = json.loads((found.path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    said = config["quantization_config"]
    assert said["format"] == "mixed-precision"
    assert len(said["config_groups"]) >= 2
    assert "lm_head" not in said["ignore"]


@ENGINE
@pytest.mark.parametrize("level", ["qdq", "integer"])
def test_a_saved_graph_is_exported(level: str, tmp_path: Path) -> None:
    model = tiny_llama()
    scheme = "w8a8-static"
    graph = fxquant.convert(model, scheme, calibration=batches(model), level=level)
    fxquant.save(graph, tmp_path / "saved")
    again = compressed_tensors(fxquant.load(tmp_path / "saved"), tmp_path / "a")
    direct = compressed_tensors(model, tmp_path / "b", scheme=scheme, calibration=batches(model))
    first, second = (load_file(e.path / "model.safetensors") for e in (again, direct))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@ENGINE
def test_half_precision_is_checked_in_float32(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    found = compressed_tensors(model, tmp_path / "out", scheme="w4-g32-asym")
    assert found.checked.under_rules <= 1e-6 * found.checked.largest
    assert "model.rotary_emb.inv_freq is in bfloat16 here" in found.checked.cause
    assert json.loads((found.path / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_file(found.path / "model.safetensors")
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float32


def unpacked(words: Tensor, bits: int, length: int) -> Tensor:
    """Written apart from ``pack``: bit by bit, from Python's integers."""
    share = 32 // bits
    rows = [
        [
            ((int(word) & 0xFFFFFFFF) >> (bits * place) & (2**bits - 1)) - 2 ** (bits - 1)
            for word in row
            for place in range(share)
        ][:length]
        for row in words
    ]
    return torch.tensor(rows, dtype=torch.int8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("length", [1, 7, 8, 33])
def test_packing(bits: int, length: int) -> None:
    low = 2 ** (bits - 1)
    codes = torch.randint(-low, low, (5, length), dtype=torch.int8)
    assert torch.equal(unpacked(pack(codes, bits), bits, length), codes)


@pytest.mark.parametrize("scheme", ["w4-g32-asym", "w3", "w8-tensor-asym"])
def test_the_file_holds_the_codes_of_the_graph(scheme: str, tmp_path: Path) -> None:
    model = tiny_llama()
    graph = fxquant.convert(model, scheme)
    exported = compressed_tensors(graph, tmp_path / "out", check=False)
    stored = load_file(exported.path / "model.safetensors")
    sites = list(coded_sites(graph))
    assert len(sites) == 14
    for site in sites:
        codes = site.codes()
        rows, length = codes.codes.shape
        bits = 8 if "w8" in scheme else 4
        words = stored[f"{site.path}.weight_packed"]
        assert torch.equal(unpacked(words, bits, length), codes.codes)
        assert stored[f"{site.path}.weight_shape"].tolist() == [rows, length]
        scales = codes.scales.expand(rows, 1) if codes.scales.dim() == 0 else codes.scales
        assert torch.equal(stored[f"{site.path}.weight_scale"], scales)
        if codes.zero_points is not None:
            zeros = unpacked(stored[f"{site.path}.weight_zero_point"].t(), bits, rows).t()
            assert torch.equal(zeros.int(), codes.zero_points.expand_as(scales).int())


class Untouched(list[Tensor]):
    """Calibration data that nobody may read."""

    def __iter__(self) -> Iterator[Tensor]:
        raise AssertionError("work began before the refusal")


REFUSED = {
    "w4-g7": ("groups of 7 do not divide its 64 columns", "w4-g4"),
    "w8+kv8": ("storage of a cache", "without +kv8"),
    "w8+kv4": ("storage of a cache", "without +kv4"),
    "w8a8-dynamic+attn8": ("attention's products", "without +attn8"),
    "w8a8-static+split_outliers": ("not some columns of each", "without +split_outliers"),
    "w8/a4-dynamic": ("inputs of int8, e4m3 or e2m1, not of int4", "a8-dynamic-token"),
    '{"scheme": "w8", "overrides": {"embeddings": "w8"}}': ("model.embed_tokens (w8)", "linears"),
    "fp": ("quantizes no weight", "save_pretrained"),
    "fp32-gemm": ("quantizes no weight", "save_pretrained"),
}


@pytest.mark.parametrize("scheme", REFUSED)
def test_refused_before_work(scheme: str, tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(ExportError) as refused:
        compressed_tensors(
            model, tmp_path / "out", scheme=scheme, calibration=Untouched(batches(model))
        )
    for part in REFUSED[scheme]:
        assert part in str(refused.value)
    assert list(tmp_path.iterdir()) == []


LATE = {
    "w8+rotate": ("layers.0.mlp.down_proj", "+rotate(online=false)"),
    "w8+correct_bias": ("layers.0.self_attn.q_proj", "without +correct_bias"),
    "w8+kv8": ("scheme w8+kv8", "without +kv8"),
}


@pytest.mark.parametrize("scheme", LATE)
def test_a_graph_is_refused_by_what_stands_in_it(scheme: str, tmp_path: Path) -> None:
    model = tiny_llama()
    graph = fxquant.convert(model, scheme, calibration=batches(model))
    with pytest.raises(ExportError) as refused:
        compressed_tensors(graph, tmp_path / "out")
    for part in LATE[scheme]:
        assert part in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_conv1d_is_no_linear(tmp_path: Path) -> None:
    model = gpt2()
    for source, scheme in ((model, "w8"), (fxquant.convert(model, "w8"), None)):
        with pytest.raises(ExportError, match="Conv1D"):
            compressed_tensors(source, tmp_path / "out", scheme=scheme)


@ENGINE
def test_nothing_is_written_where_the_engine_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    compressed_tensors(model, tmp_path / "out", scheme="w8")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    honest = compressed_file.site_tensors

    def damaged(site: CodedSite) -> dict[str, Tensor]:
        found = honest(site)
        return {**found, "weight_scale": found["weight_scale"] * 1.001}

    monkeypatch.setattr(compressed_file, "site_tensors", damaged)
    for name in ("out", "new"):
        with pytest.raises(ExportError, match=r"nothing is written.*largest difference"):
            compressed_tensors(model, tmp_path / name, scheme="w8")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_save_pretrained_writes_is_there(tmp_path: Path) -> None:
    model, tokenizer = small_opt()
    given = GenerationConfig(max_new_tokens=7)
    exported = compressed_tensors(
        model, tmp_path / "out", scheme="w8", tokenizer=tokenizer, generation_config=given,
        check=False,
    )  # fmt: skip
    assert exported.checked.skipped == "as asked"
    again = GenerationConfig.from_pretrained(exported.path)
    assert again.max_new_tokens == 7
    assert (exported.path / "tokenizer.json").exists()
    config = json.loads((exported.path / "config.json").read_text())
    assert config["model_type"] == "opt"
    names = set(load_file(exported.path / "model.safetensors"))
    assert "model.decoder.embed_tokens.weight" in names
    assert "lm_head.weight" not in names  # tied


@ENGINE
def test_a_coded_head_above_linears_of_another_class(tmp_path: Path) -> None:
    scheme = '{"scheme": "fp", "overrides": {"lm_head": "w8"}}'
    assert compressed_tensors(gpt2(), tmp_path / "out", scheme=scheme).checked.difference == 0


def test_streamed_as_in_memory(tmp_path: Path) -> None:
    streamed = fxquant.load_model(SMALL_OPT, streamed=True).graph
    whole = compressed_tensors(small_opt()[0], tmp_path / "whole", scheme="w4-g32", check=False)
    found = compressed_tensors(streamed, tmp_path / "streamed", scheme="w4-g32")
    assert "streamed" in found.checked.skipped
    first, second = (load_file(e.path / "model.safetensors") for e in (whole, found))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].float(), second[name].float()) for name in first)


@ENGINE
def test_a_model_with_other_rotary_tables_is_not_excused(tmp_path: Path) -> None:
    gm = fxquant.convert(tiny_llama(), "w8")
    config = json.loads(info(gm).config)
    holds = config if "rope_theta" in config else config["rope_parameters"]
    holds["rope_theta"] = 500.0
    update_info(gm, config=json.dumps(config))
    with pytest.raises(ExportError, match=r"nothing is written.*largest difference"):
        compressed_tensors(gm, tmp_path / "out")


@ENGINE
def test_a_generation_config_is_written_as_the_model_has_it(tmp_path: Path) -> None:
    usual = GenerationConfig(temperature=0.5, do_sample=False)
    target = tmp_path / "out"
    compressed_tensors(tiny_llama(), target, scheme="w8", generation_config=usual)
    assert json.loads((target / "generation_config.json").read_text())["temperature"] == 0.5


@ENGINE
def test_what_the_engine_does_not_load_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(folder: Path) -> PreTrainedModel:
        with door(ModelError, f"cannot load {folder}: weights", (AttributeError,)):
            raise AttributeError("'Linear' object has no attribute 'weight'")

    monkeypatch.setattr(compressed_rules, "read_written", unread)
    with pytest.raises(ExportError, match="does not load what was written") as refused:
        compressed_tensors(tiny_llama(), tmp_path / "out", scheme="w8")
    said = str(refused.value)
    assert "'Linear' object has no attribute 'weight'" in said
    assert "--no-check" in said
    assert str(tmp_path) not in said
    assert list(tmp_path.iterdir()) == []


@ENGINE
def test_a_model_whose_loader_misses_weights_is_right_or_said(tmp_path: Path) -> None:
    """transformers 5 initializes GPT-BigCode's weights that codes stand for."""
    said = ""
    try:
        found = compressed_tensors(MORE["gpt-bigcode"](), tmp_path / "out", scheme="w8")
    except ExportError as error:
        said = str(error)
    assert "does not load what was written" in said if said else found.checked.passed
    assert (tmp_path / "out").exists() is not bool(said)
