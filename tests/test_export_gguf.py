"""GGUF files: what stands in them, that transformers computes the same, and their tokenizers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import fxquant
from fxquant.errors import ExportError
from fxquant.exports import gguf, with_half_scales
from fxquant.exports.gguf_blocks import blocks, pairs
from fxquant.exports.gguf_file import MODEL
from fxquant.exports.gguf_tokenizer import vocabulary
from fxquant.exports.sites import coded_sites
from fxquant.formats.integer import integer
from fxquant.formats.scales import FP16
from fxquant.frontends.pretrained import read_gguf_tokenizer
from fxquant.numerics.weight_codes import min_max_codes
from fxquant.schemes.scheme import Scheme
from tests.architectures import build, gpt2, randomize
from tests.test_export_compressed import Untouched, batches, tiny_llama

READER = pytest.mark.needs_program(find_spec("gguf"), "gguf, of the exports extra")
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MIXED = (
    '{"scheme": "w4-g32-fp16", "overrides": {"embeddings": "w8-g32-fp16", "head": "w8-g32-fp16", '
    '"*.layers.0.*": "w4-g32-fp16-asym", "*.layers.1.self_attn.o_proj": "fp"}}'
)


def qwen(number: int) -> PreTrainedModel:
    config, kind = {2: (Qwen2Config, Qwen2ForCausalLM), 3: (Qwen3Config, Qwen3ForCausalLM)}[number]
    model = build(kind, config(**SIZES))
    randomize(model, 3)
    return model


@READER
@pytest.mark.parametrize("scheme", ["fp", "w8-g32-fp16", "w4-g32-fp16+gptq", MIXED])
def test_scales_of_fp16_give_the_graphs_logits(scheme: str, tmp_path: Path) -> None:
    model = tiny_llama()
    found = gguf(model, tmp_path / "out", scheme=scheme, calibration=batches(model)).checked
    assert found.difference <= 1e-6 * found.largest
    assert "gguf" in found.engine


@READER
@pytest.mark.parametrize("number", [2, 3])
def test_models_that_rotate_halves(number: int, tmp_path: Path) -> None:
    found = gguf(qwen(number), tmp_path / "out", scheme="w4-g32-fp16-asym").checked
    assert found.difference <= 1e-6 * found.largest


@READER
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    import gguf as library

    found = gguf(tiny_llama(dtype=dtype), tmp_path / "out", scheme="fp")
    assert found.checked.under_rules <= 1e-6 * found.checked.largest
    kinds = {t.name: t.tensor_type.name for t in library.GGUFReader(found.path / MODEL).tensors}
    assert kinds["blk.0.attn_q.weight"] == {torch.float16: "F16"}.get(dtype, "BF16")
    assert kinds["blk.0.attn_norm.weight"] == "F32"


@READER
@pytest.mark.parametrize("scheme", ["w8-g32", "w4-g32-asym"])
def test_other_scales_move_and_it_is_said(scheme: str, tmp_path: Path) -> None:
    graph = fxquant.convert(tiny_llama(), scheme)
    found = gguf(graph, tmp_path / "a").checked
    assert found.difference > 1e-5 * found.largest
    assert found.under_rules <= 1e-6 * found.largest
    spelled = scheme.replace("g32", "g32-fp16")
    assert f"in fp16, by up to 0.00{'7' if 'asym' in scheme else '0'}" in found.cause
    assert f"{spelled} has them there from the start" in found.cause
    again = gguf(with_half_scales(graph), tmp_path / "b").checked
    assert again.difference <= 1e-6 * again.largest
    assert (tmp_path / "a" / MODEL).read_bytes() == (tmp_path / "b" / MODEL).read_bytes()


@READER
@pytest.mark.parametrize("samples", [True, False])
def test_how_a_token_is_sampled_is_kept(samples: bool, tmp_path: Path) -> None:
    from gguf import GGUFReader

    usual = GenerationConfig(
        do_sample=samples, temperature=0.625, top_k=7, top_p=0.75, repetition_penalty=1.25
    )
    exported = gguf(
        tiny_llama(), tmp_path / "out", scheme="w8-g32-fp16", generation_config=usual, check=False
    )
    fields = GGUFReader(exported.path / MODEL).fields
    prefix = "general.sampling."
    found = {
        name.removeprefix(prefix): field.contents()
        for name, field in fields.items()
        if name.startswith(prefix)
    }
    always = {"penalty_repeat": 1.25, "penalty_last_n": -1}  # of all tokens, not the last 64
    sampled = {"temp": 0.625, "top_k": 7, "top_p": 0.75}
    assert found == (always | sampled if samples else always)


@READER
def test_a_saved_graph_is_exported(tmp_path: Path) -> None:
    graph = fxquant.convert(tiny_llama(), "w4-g32-fp16-asym", level="qdq")
    fxquant.save(graph, tmp_path / "saved")
    loaded = fxquant.load(tmp_path / "saved")
    assert loaded.get_submodule("model.layers.0.mlp.up_proj").weight_scale.dtype == torch.float16
    again, direct = gguf(loaded, tmp_path / "a"), gguf(graph, tmp_path / "b", check=False)
    assert (again.path / MODEL).read_bytes() == (direct.path / MODEL).read_bytes()


@READER
@pytest.mark.parametrize("scheme", ["w8-g32-fp16", "w4-g32-fp16", "w4-g32-fp16-asym"])
def test_the_file_holds_the_numbers_of_the_graph(scheme: str, tmp_path: Path) -> None:
    """By gguf's own reading of its blocks."""
    import gguf as library

    graph = fxquant.convert(tiny_llama(), scheme)
    exported = gguf(graph, tmp_path / "out", check=False)
    tensors = {t.name: t for t in library.GGUFReader(exported.path / MODEL).tensors}
    names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, 2)
    sites = list(coded_sites(graph))
    assert len(sites) == 14
    for site in sites:
        stored = tensors[f"{names.get_name(site.path)}.weight"]
        found = torch.from_numpy(library.quants.dequantize(stored.data, stored.tensor_type))
        expected = site.codes().dequantize()
        for own, heads in (("q_proj", 4), ("k_proj", 2)):
            if site.path.endswith(own):
                expected = expected.view(heads, 2, 8, 64).transpose(1, 2).reshape(-1, 64)
        assert torch.equal(found, expected), site.path


@pytest.mark.parametrize("grid", [integer(8), integer(4), integer(4, symmetric=False)])
def test_scales_lie_on_the_grid_of_the_file(grid: Any) -> None:
    scales = torch.rand(2000) * torch.logspace(-12, 3, 2000) + 1e-12
    found = FP16.nearest(scales, grid)
    assert torch.equal(found.half().float(), found)
    assert torch.equal(FP16.nearest(found, grid), found)
    digits = 7 if grid.has_zero_point else 11
    # Never further than half a step, also where fp16 has fewer digits: no rounding upon another.
    step = 2.0 ** (torch.frexp(scales).exponent - digits).clamp(min=-24).double()
    assert bool(((found.double() - scales) / step).abs()[scales > 2.0**-25].max() <= 0.5)
    apart = ((found - scales) / scales).abs()[scales > 1e-4]
    assert 2.0 ** -(digits + 3) < float(apart.max()) <= 2.0**-digits
    for multiple in range(16 if grid.has_zero_point else 2):
        minimum = found * multiple
        assert torch.equal(minimum.half().float(), minimum)


def test_nothing_is_rounded_twice() -> None:
    spec = Scheme.parse("w4-g32").spec.weight
    assert spec is not None
    with pytest.raises(ValueError, match="rounded twice"):
        blocks(min_max_codes(torch.randn(4, 64), spec, "here"))


def test_pairs_of_rows() -> None:
    assert pairs(torch.arange(12), 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


TEXT = ["The quick brown fox's tail, two  spaces;\n\ttabs: naïve café 123 日本"] * 3


def trained(spaces: str, split: Any, **options: Any) -> PreTrainedTokenizerFast:
    """A small BPE tokenizer: by bytes, or by pieces with a mark for a space."""
    made = Tokenizer(models.BPE(**options))
    by_bytes = spaces == "Ġ"
    alphabet = pre_tokenizers.ByteLevel.alphabet() if by_bytes else []
    made.pre_tokenizer = split
    if not by_bytes:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.decoder = decoders.Replace("▁", " ")
    special = ["<unk>", "<s>", "</s>"]
    special += [] if by_bytes else [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + 60, special_tokens=special, show_progress=False,
        initial_alphabet=alphabet,
    )  # fmt: skip
    made.train_from_iterator(TEXT, trainer)
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names, chat_template="{{ messages }}")


def llama_for(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    from transformers import LlamaForCausalLM

    size = len(tokenizer) + 3  # rows that no token has
    model = build(LlamaForCausalLM, LlamaConfig(**{**SIZES, "vocab_size": size}))
    randomize(model, 3)
    return model


@READER
def test_a_byte_level_tokenizer(tmp_path: Path) -> None:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = trained("Ġ", split)
    exported = gguf(llama_for(tokenizer), tmp_path / "out", scheme="fp", tokenizer=tokenizer)
    assert "the same ids for 4 of 4 texts" in exported.checked.cause
    other = read_gguf_tokenizer(exported.path / MODEL)
    assert other.decode(other(TEXT[0])["input_ids"], skip_special_tokens=True) == TEXT[0]
    assert other.chat_template == "{{ messages }}"
    words = vocabulary(tokenizer, len(tokenizer) + 3)
    assert (words.model, words.pre, words.adds_bos, words.adds_space) == (
        *("gpt2", "gpt-2"),
        *(False, False),
    )
    assert words.tokens[-1].startswith("[PAD")
    assert words.types[:3] == (3, 3, 3)
    assert words.types[-3:] == (5, 5, 5)


@READER
def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    tokenizer = trained("▁", None, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    words = vocabulary(tokenizer, len(tokenizer))
    assert (words.model, words.adds_space) == ("llama", True)
    assert words.types[:4] == (2, 3, 3, 6)
    ranks = [merge.replace(" ", "", 1) for merge in words.merges]
    scores = dict(zip(words.tokens, words.scores, strict=True))
    assert [scores[token] for token in ranks] == [-float(rank) for rank in range(len(ranks))]
    assert all(score < 1 - len(ranks) for token, score in scores.items() if len(token) == 1)
    exported = gguf(llama_for(tokenizer), tmp_path / "out", scheme="fp", tokenizer=tokenizer)
    assert "transformers reads its tokenizer" in exported.checked.cause


def test_names_of_what_splits_a_text() -> None:
    isolated = pre_tokenizers.Digits(individual_digits=True)
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    smollm = trained("Ġ", pre_tokenizers.Sequence([isolated, by_bytes]))
    assert vocabulary(smollm, 999).pre == "smollm"
    strange = trained("Ġ", pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), by_bytes]))
    with pytest.raises(ExportError, match=r"Punctuation and ByteLevel.*leave the tokenizer out"):
        vocabulary(strange, 999)
    with pytest.raises(ExportError, match="the model 9 embeddings"):
        vocabulary(smollm, 9)


REFUSED = {
    "w4-g32-e4m3": ("not codes under one in fp32", "w4-g32-fp16"),
    "w8": ("groups of 32", "w8-g32-fp16"),
    "w4-g16-asym": ("model.layers.0.self_attn.q_proj", "w4-g32-fp16-asym"),
    "w8a8-static": ("codes inputs by a rule of its own", "w8-g32-fp16"),
    "wnf4-g32": ("its blocks are", "w4-g32-fp16"),
    "w4-g32+kv8": ("a setting of llama.cpp", "without +kv8"),
}


@READER
@pytest.mark.parametrize("scheme", REFUSED)
def test_refused_before_work(scheme: str, tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(ExportError) as refused:
        gguf(model, tmp_path / "out", scheme=scheme, calibration=Untouched(batches(model)))
    for part in REFUSED[scheme]:
        assert part in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@READER
def test_models_that_a_file_cannot_say(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    scaled = LlamaConfig(**SIZES, rope_scaling={"rope_type": "linear", "factor": 2.0})
    biased = LlamaConfig(**SIZES, attention_bias=True)
    cases = ((gpt2(), "type gpt2"), (build(LlamaForCausalLM, scaled), "scaled (linear)"))
    for model, said in (*cases, (build(LlamaForCausalLM, biased), "biases")):
        for scheme in ("w8-g32", "fp"):
            with pytest.raises(ExportError) as refused:
                gguf(model, tmp_path / "out", scheme=scheme)
            assert said in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@READER
def test_nothing_is_written_where_the_engine_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxquant.exports import gguf_file

    def unturned(rows: Tensor, heads: int) -> Tensor:
        return rows

    monkeypatch.setattr(gguf_file, "pairs", unturned)
    with pytest.raises(ExportError, match=r"nothing is written.*largest difference"):
        gguf(tiny_llama(), tmp_path / "out", scheme="fp")
    assert list(tmp_path.iterdir()) == []
