"""GPTQ and AWQ checkpoints: what stands in them, by a reading of words apart from the library's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

import fxquant
from fxquant.errors import ExportError
from fxquant.exports import awq, gptq, gptq_file
from fxquant.exports.half_scales import in_half
from fxquant.exports.sites import coded_sites
from fxquant.exports.table import FORMATS
from fxquant.exports.words import words
from fxquant.numerics.weight_codes import min_max_codes
from fxquant.schemes.scheme import Scheme
from tests.architectures import build, gpt2
from tests.environments import TRANSFORMERS_5
from tests.test_export_compressed import ENGINE, Untouched, batches, tiny_llama


def number(row: Tensor, bits: int, index: int) -> int:
    """The ``index``-th number in a row of words, by Python's integers."""
    whole: int = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row))
    return (whole >> (bits * index)) & ((1 << bits) - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_a_stream_of_bits(bits: int) -> None:
    numbers = torch.randint(0, 2**bits, (3, 64))
    packed = words(numbers, bits)
    assert packed.shape == (3, 2 * bits)
    assert packed.dtype == torch.int32
    for row, wanted in zip(packed, numbers.tolist(), strict=True):
        assert [number(row, bits, index) for index in range(64)] == wanted


GPTQ = ("w4-g32-fp16", "w3-g32-fp16-asym", "w2-g32-fp16", "w8-g32-fp16-asym", "w4-g32-fp16+gptq")


@pytest.mark.parametrize("scheme", GPTQ)
def test_gptq(scheme: str, tmp_path: Path) -> None:
    """AutoGPTQ: words run along K in qweight and along N in qzeros, whose v1 keeps zeros less 1."""
    model = tiny_llama()
    graph = fxquant.convert(model, scheme, calibration=batches(model))
    exported = gptq(graph, tmp_path / "out")
    assert exported.checked.difference <= 1e-6 * exported.checked.largest
    said = json.loads((exported.path / "quantize_config.json").read_text())
    config = json.loads((exported.path / "config.json").read_text())["quantization_config"]
    assert said == config
    symmetric = "asym" not in scheme
    assert (said["bits"], said["group_size"], said["sym"]) == (int(scheme[1]), 32, symmetric)
    assert said["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    stored, bits = load_file(exported.path / "model.safetensors"), said["bits"]
    for site in coded_sites(graph):
        held, (rows, length) = site.codes(), site.site.shape
        part = {key: stored[f"{site.path}.{key}"] for key in ("qweight", "qzeros", "scales")}
        groups = stored[f"{site.path}.g_idx"]
        assert part["qweight"].shape == (length * bits // 32, rows)
        assert part["scales"].dtype == torch.float16
        assert groups.tolist() == [column // 32 for column in range(length)]
        for row, column in zip(torch.randint(rows, (9,)), torch.randint(length, (9,)), strict=True):
            code = number(part["qweight"][:, row], bits, int(column))
            zero = number(part["qzeros"][groups[column]], bits, int(row)) + symmetric
            scale = part["scales"][groups[column], row].float()
            assert (code - zero) * scale == held.dequantize()[row, column]


@pytest.mark.parametrize("scheme", ["w4-g32-fp16-asym", "w4-g32-fp16"])
def test_awq(scheme: str, tmp_path: Path) -> None:
    """AutoAWQ's GEMM: eight columns of N in a word, in the order 0 2 4 6 1 3 5 7."""
    model = tiny_llama()
    both = {"scheme": scheme, "overrides": {"*.1.self_attn.o_proj": "fp"}}
    graph = fxquant.convert(model, both)
    exported = awq(graph, tmp_path / "out")
    assert exported.checked.difference <= 1e-6 * exported.checked.largest
    said = json.loads((exported.path / "config.json").read_text())["quantization_config"]
    assert said["modules_to_not_convert"] == ["model.layers.1.self_attn.o_proj", "lm_head"]
    stored, order = load_file(exported.path / "model.safetensors"), (0, 2, 4, 6, 1, 3, 5, 7)
    for site in coded_sites(graph):
        held, (rows, length) = site.codes(), site.site.shape
        part = {key: stored[f"{site.path}.{key}"] for key in ("qweight", "qzeros", "scales")}
        assert part["qweight"].shape == (length, rows // 8)
        for row, column in zip(torch.randint(rows, (9,)), torch.randint(length, (9,)), strict=True):
            slot = order.index(int(row) % 8)
            word, group = int(row) // 8, int(column) // 32
            code = number(part["qweight"][column, word : word + 1], 4, slot)
            zero = number(part["qzeros"][group, word : word + 1], 4, slot)
            scale = part["scales"][group, row].float()
            assert (code - zero) * scale == held.dequantize()[row, column]


@pytest.mark.parametrize("scheme", ["w4", "w4-asym", "w4-tensor", "w4-g32"])
@pytest.mark.parametrize("export", [gptq, awq])
def test_other_scales_move_and_it_is_said(scheme: str, export: object, tmp_path: Path) -> None:
    assert callable(export)
    found = export(tiny_llama(), tmp_path / "out", scheme=scheme).checked
    assert found.difference > 1e-5 * found.largest
    assert found.under_rules <= 1e-6 * found.largest
    assert "to their nearest in fp16, by up to 0.000" in found.cause


@pytest.mark.parametrize("export", [gptq, awq])
def test_one_group_size_is_said_of_rows_of_several_lengths(export: object, tmp_path: Path) -> None:
    """Rows of 64 are one group, those of down_proj two."""
    assert callable(export)
    model = tiny_llama(inner=128)
    exported = export(model, tmp_path / "out", scheme="w4-g64-fp16")
    assert exported.checked.difference <= 1e-6 * exported.checked.largest
    config = json.loads((exported.path / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == 64
    stored = load_file(exported.path / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.scales"].shape == (2, 64)
    assert stored["model.layers.0.mlp.up_proj.scales"].shape == (1, 128)


@pytest.mark.parametrize("export", [gptq, awq])
def test_rows_shorter_than_the_one_group_are_refused(export: object, tmp_path: Path) -> None:
    assert callable(export)
    model = tiny_llama(inner=256)
    with pytest.raises(ExportError, match=r"128 does not divide its 64 columns.*: w4-g64$"):
        export(model, tmp_path / "out", scheme="w4-g128")
    assert list(tmp_path.iterdir()) == []


def test_a_group_size_that_is_not_the_files_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq_file, "common_group_size", lambda gm: -1)
    with pytest.raises(ExportError, match=r"nothing is written: g_idx is not in groups of -1"):
        gptq(tiny_llama(), tmp_path / "out", scheme="w4-g32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("scheme", "most"), [("w4-g32-asym", 4096.0), ("w4-g32", 65504.0)])
def test_scales_that_the_file_has_no_number_for_are_refused(scheme: str, most: float) -> None:
    spec = Scheme.parse(scheme).spec.weight
    assert spec is not None
    held = min_max_codes(torch.randn(4, 64), spec, "here")
    for factor in (0.9, 1.1):
        scales = held.scales / held.scales.max() * most * factor
        moved = replace(held, scales=scales)
        if factor < 1:
            assert torch.allclose(in_half(moved, "here", True).scales, scales, rtol=2.0**-7)
            continue
        with pytest.raises(
            ExportError, match=rf"here: a scale of {most * 1.1:.6g} is .*{most:.0f}"
        ):
            in_half(moved, "here", True)


REFUSED = {
    "w4-g32-e4m3": ("not codes under one in fp32", "w4-g32-fp16"),
    "w5": ("integers of", "w4-g128"),
    "w8a8-static": ("run inputs in float", "w4-g128"),
    "w4-g7": ("groups of 7 do not divide its 64 columns", "w4-g4"),
    "w4+kv8": ("nothing of attention", "without +kv8"),
    '{"scheme": "w4", "overrides": {"head": "w4"}}': ("lm_head", "nearest that it can: fp there"),
    '{"scheme": "w4", "overrides": {"*.v_proj": "w4-asym"}}': (
        "once for all",
        "nearest that it can: w4",
    ),
    "fp": ("quantizes no weight", "save_pretrained"),
}


@pytest.mark.parametrize("export", [gptq, awq])
@pytest.mark.parametrize("scheme", REFUSED)
def test_refused_before_work(scheme: str, export: object, tmp_path: Path) -> None:
    assert callable(export)
    model = tiny_llama()
    with pytest.raises(ExportError) as refused:
        export(model, tmp_path / "out", scheme=scheme, calibration=Untouched(batches(model)))
    for part in REFUSED[scheme]:
        assert part in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_gptq_codes_every_linear_and_awq_none_of_8_bits(tmp_path: Path) -> None:
    left = {"scheme": "w4", "overrides": {"*.v_proj": "fp"}}
    with pytest.raises(ExportError, match=r"v_proj in float.*every linear"):
        gptq(tiny_llama(), tmp_path / "out", scheme=left)
    with pytest.raises(ExportError, match="integers of 4 bits, not int8"):
        awq(tiny_llama(), tmp_path / "out", scheme="w8")
    with pytest.raises(ExportError, match="Conv1D"):
        gptq(gpt2(), tmp_path / "out", scheme="w4")


def test_nothing_is_written_where_the_layout_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = gptq_file.site_tensors

    def without_the_one(held: object) -> dict[str, Tensor]:
        found = honest(held)  # type: ignore[arg-type]
        return {**found, "qzeros": found["qzeros"] + 0x11111111}

    monkeypatch.setattr(gptq_file, "site_tensors", without_the_one)
    with pytest.raises(ExportError, match=r"nothing is written.*largest difference"):
        gptq(tiny_llama(), tmp_path / "out", scheme="w4-g32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(TRANSFORMERS_5, reason="Gemma 2 is eager there")
@pytest.mark.parametrize("target", [pytest.param("compressed-tensors", marks=ENGINE), "gptq"])
def test_attention_that_transformers_computes_otherwise_is_the_cause(
    target: str, tmp_path: Path
) -> None:
    config = Gemma2Config(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, attn_logit_softcapping=1.5,
        query_pre_attn_scalar=16, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = build(Gemma2ForCausalLM, config, attention="eager")
    export = FORMATS[target].export
    with pytest.raises(ExportError, match=r"nothing is written.*attention is sdpa there") as found:
        export(model, tmp_path / "out", scheme="w4-g32-fp16" if target == "gptq" else "w4-g32")
    assert "attn_implementation='eager'" in str(found.value)
