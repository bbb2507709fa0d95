"""Tokenizers for GGUF: those that llama.cpp splits a text for as they do; others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fxquant
from fxquant.cli.main import main
from fxquant.errors import ExportError
from fxquant.exports import gguf
from fxquant.exports.gguf_file import MODEL
from fxquant.exports.gguf_tokenizer import vocabulary
from tests.architectures import gpt2
from tests.test_export_compressed import Untouched, batches
from tests.test_export_gguf import READER, llama_for, trained

LLAMA3, QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("{1,3}", "")
)  # fmt: skip


def by_pattern(*, regex: bool = False, pattern: str = LLAMA3, invert: bool = False) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated", invert)
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    return pre_tokenizers.Sequence([split, by_bytes])


def test_patterns_that_llama_cpp_has_names_for() -> None:
    tokenizer = trained("Ġ", by_pattern())
    assert vocabulary(tokenizer, 999).pre == "smaug-bpe"
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert vocabulary(tokenizer, 999).pre == "smaug-bpe"
    assert vocabulary(trained("Ġ", by_pattern(), ignore_merges=True), 999).pre == "llama-bpe"
    assert vocabulary(trained("Ġ", by_pattern(pattern=QWEN2)), 999).pre == "qwen2"


def test_bytes_that_llama_cpp_would_merge_differently_are_refused() -> None:
    qwen, gpt2 = by_pattern(pattern=QWEN2), pre_tokenizers.ByteLevel(add_prefix_space=False)
    for split in (qwen, gpt2):
        with pytest.raises(ExportError, match=r"no name.*ByteLevel and ignore_merges"):
            vocabulary(trained("Ġ", split, ignore_merges=True), 999)
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        tokenizer = trained("Ġ", by_pattern())
        setattr(tokenizer.backend_tokenizer.model, name, "##")
        with pytest.raises(ExportError, match=rf"its {name} \('##'\)"):
            vocabulary(tokenizer, 999)


BYTES: dict[str, tuple[Any, Any]] = {
    "no pattern": (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), None),
    "a space before": (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    "two patterns": (by_pattern(regex=True), None),
    "inverted": (by_pattern(invert=True), None),
    "another pattern": (by_pattern(pattern=r"\p{L}+"), None),
    "lowercase": (by_pattern(), normalizers.Lowercase()),
    "lowercase among others": (
        by_pattern(),
        normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]),
    ),
    "NFC before gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC()),
}


@pytest.mark.parametrize("case", BYTES)
def test_bytes_that_llama_cpp_would_split_differently_are_refused(case: str) -> None:
    split, normalizer = BYTES[case]
    tokenizer = trained("Ġ", pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert vocabulary(tokenizer, 999).pre == "gpt-2"
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.backend_tokenizer.normalizer = normalizer
    with pytest.raises(ExportError, match=r"no name.*ByteLevel.*leave the tokenizer out"):
        vocabulary(tokenizer, 999)


def test_pieces_that_llama_cpp_would_split_differently_are_refused() -> None:
    options = {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    assert vocabulary(trained("▁", pre_tokenizers.Metaspace(), **options), 999).model == "llama"
    with pytest.raises(ExportError, match="Prepend and Replace and Punctuation"):
        vocabulary(trained("▁", pre_tokenizers.Punctuation(), **options), 999)
    tokenizer = trained("▁", None, **options)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ExportError, match="Lowercase"):
        vocabulary(tokenizer, 999)


@READER
def test_chat_templates_by_name_are_kept(tmp_path: Path) -> None:
    import gguf as library

    tokenizer = trained("Ġ", pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    exported = gguf(
        llama_for(tokenizer), tmp_path / "out", scheme="fp", tokenizer=tokenizer, check=False
    )
    fields = library.GGUFReader(exported.path / MODEL).fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}"
    assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]


def unsplit() -> PreTrainedTokenizerFast:
    return trained("Ġ", by_pattern(pattern=r"\p{L}+"))


@READER
@pytest.mark.parametrize("traced", [False, True])
def test_a_tokenizer_is_refused_before_work(traced: bool, tmp_path: Path) -> None:
    model = llama_for(unsplit())
    source = fxquant.trace(model) if traced else model
    scheme, given = "w4-g32-fp16+gptq", Untouched(batches(model))
    with pytest.raises(ExportError, match=r"no name.*leave the tokenizer out"):
        gguf(source, tmp_path / "out", scheme=scheme, calibration=given, tokenizer=unsplit())
    with pytest.raises(ExportError, match="of type gpt2 is not written here"):
        gguf(gpt2(), tmp_path / "out", scheme="fp", tokenizer=unsplit())
    assert list(tmp_path.iterdir()) == []


@READER
def test_the_command_refuses_a_tokenizer_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the model was converted")

    monkeypatch.setattr("fxquant.recipes.conversion.convert", forbidden)
    monkeypatch.setattr("fxquant.cli.converting.cut", forbidden)
    llama_for(unsplit()).save_pretrained(tmp_path / "model")
    unsplit().save_pretrained(tmp_path / "model")
    asked = ["export", "--to", "gguf", "--model", str(tmp_path / "model")]
    asked += ["--scheme", "w4-g32-fp16+gptq", "--length", "48", "--calibration-windows", "2"]
    for more in ([], ["--stream"]):
        assert main([*asked, *more, "--output", str(tmp_path / "out")]) == 2
        assert "gguf cannot hold the tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
