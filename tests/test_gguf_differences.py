"""GGUF: what llama.cpp, or transformers' reader, would take otherwise is refused, or written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers import PreTrainedTokenizerFast as Tokens

import fxquant
from fxquant.errors import ExportError
from fxquant.exports import gguf
from fxquant.exports.gguf_file import MODEL, check_tokenizer
from fxquant.exports.gguf_model import title
from fxquant.exports.gguf_tokenizer import vocabulary
from tests.architectures import build, randomize
from tests.test_export_gguf import READER, SIZES, llama_for, trained


def by_bytes() -> Tokens:
    return trained("Ġ", pre_tokenizers.ByteLevel(add_prefix_space=False))


def edited(tokenizer: Tokens, change: Callable[[Any], None]) -> Tokens:
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    change(data)
    made = Tokenizer.from_str(json.dumps(data))
    return Tokens(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def pieces(merges: list[tuple[str, str]] | None = None, *, least: int = 0) -> Tokens:
    """Of the letters a to d; ``least``: the first byte that is a token."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(least, 256))]
    given = [("▁", "a"), ("b", "c"), ("a", "bc")] if merges is None else merges
    tokens += dict.fromkeys([*"▁abcd", *("".join(pair) for pair in given)])
    ids = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(ids, given, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = marks()
    return Tokens(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def marks(before: str = "▁", written: str = "▁") -> Any:
    return normalizers.Sequence([normalizers.Prepend(before), normalizers.Replace(" ", written)])


def marked(normalizer: Any, splitter: Any = None) -> Tokens:
    tokenizer = pieces([("▁", "a"), ("▁", "▁")])
    tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.backend_tokenizer.pre_tokenizer = splitter
    return tokenizer


def added(tokenizer: Tokens, *tokens: str, **flags: bool) -> Tokens:
    tokenizer.add_tokens([AddedToken(token, **{"normalized": False, **flags}) for token in tokens])
    return tokenizer


def around(template: str) -> Tokens:
    tokenizer = by_bytes()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<unk>", 0), ("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def without(tokenizer: Tokens, **fields: Any) -> Tokens:
    for name, value in fields.items():
        setattr(tokenizer, name, value)
    return tokenizer


def no_letter(data: Any) -> None:
    model = data["model"]
    model["merges"] = [pair for pair in model["merges"] if "a" not in "".join(pair)]
    kept = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token != "a"]
    model["vocab"] = {token: number for number, token in enumerate(kept)}


def metaspace(scheme: str, mark: str = "▁", split: bool = False) -> Any:
    return pre_tokenizers.Metaspace(mark, scheme, split)


REFUSED: dict[str, tuple[Callable[[], Tokens], str]] = {
    "lstrip": (lambda: added(by_bytes(), "<tok>", lstrip=True), "'<tok>' has lstrip"),
    "rstrip": (lambda: added(by_bytes(), "<tok>", rstrip=True), "'<tok>' has rstrip"),
    "words": (lambda: added(by_bytes(), "tok", single_word=True), "'tok' has single_word"),
    "sought among marks": (lambda: added(pieces(), "<tok>", normalized=True), r"\(normalized\)"),
    "overlapping": (lambda: added(by_bytes(), "ab", "bcd"), "'ab' and 'bcd' overlap"),
    "two bos": (lambda: around("<s> <s> $A"), "around a text it puts"),
    "an unknown before": (lambda: around("<unk> $A"), "around a text it puts"),
    "an eos before": (lambda: around("</s> $A"), "around a text it puts"),
    "no eos": (lambda: without(by_bytes(), eos_token=None), "has no eos_token"),
    "no merges": (
        lambda: edited(by_bytes(), lambda data: data["model"].update(merges=[])), "no merges",
    ),
    "dropout": (
        lambda: edited(by_bytes(), lambda data: data["model"].update(dropout=0.5)), "its dropout",
    ),
    "no letter": (lambda: edited(by_bytes(), no_letter), "'a', a byte of usual text, is no token"),
    "templates": (
        lambda: without(by_bytes(), chat_template={"a-b": "x", "a_b": "y"}), "'a-b' and another",
    ),
    "no byte": (lambda: pieces(least=9), "has no <0x00>"),
    "apart": (lambda: pieces([("b", "c"), ("a", "b"), ("ab", "c")]), "joins 'a' and 'bc'"),
    "other spaces": (lambda: marked(marks(written="_")), "and changes nothing else"),
    "another mark before": (lambda: marked(marks(before="x")), "and changes nothing else"),
    "unmarked": (lambda: marked(None), "does not write ▁"),
    "always": (lambda: marked(None, metaspace("always")), "by the scheme always"),
    "first": (lambda: marked(None, metaspace("first")), "by the scheme first"),
    "another mark": (lambda: marked(None, metaspace("never", "_")), "it writes _ for a space"),
    "splits": (lambda: marked(None, metaspace("never", split=True)), "joins tokens across them"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_ids_that_llama_cpp_would_give_otherwise(case: str) -> None:
    made, said = REFUSED[case]
    with pytest.raises(ExportError, match=rf"gguf cannot hold the tokenizer.*{said}.*leave the"):
        vocabulary(made(), 999)


def random_pieces(seed: int) -> Tokens:
    """Merges of any two tokens, in any order."""
    source, tokens, merges = random.Random(seed), list("abcd"), []
    for _ in range(14):
        pair = source.choice(tokens), source.choice(tokens)
        if len("".join(pair)) <= 5 and pair not in merges:
            merges.append(pair)
            tokens.append("".join(pair))
    return pieces(merges)


HELD: dict[str, Callable[[], Tokens]] = {
    "a row's name": lambda: (lambda t: added(t, f"[PAD{len(t) + 2}]"))(by_bytes()),
    "runs of spaces": lambda: added(by_bytes(), *(" " * count for count in range(2, 6))),
    "special": lambda: added(pieces(), "<tok>", special=True),
    "a byte's name": lambda: added(by_bytes(), "<0x41>"),
    "bos and eos": lambda: around("<s> $A </s>"),
    "Metaspace": lambda: marked(None, metaspace("never")),
    "Metaspace behind marks": lambda: marked(marks(), metaspace("always")),
    "no mark before": lambda: marked(normalizers.Replace(" ", "▁")),
    "one token by two merges": lambda: pieces(
        [("b", "c"), ("d", "d"), ("ab", "c"), ("c", "d"), ("a", "bc"), ("a", "b")]
    ),
}


@pytest.mark.parametrize("case", HELD)
def test_a_row_a_token_and_each_has_its_own_name(case: str) -> None:
    tokenizer = HELD[case]()
    words = vocabulary(tokenizer, len(tokenizer) + 3)
    assert len(set(words.tokens)) == len(tokenizer) + 3
    assert all(words.tokens[number] == token for token, number in tokenizer.get_vocab().items())
    byte = words.types[words.tokens.index("<0x41>")] if "<0x41>" in words.tokens else 0
    assert byte == {"a byte's name": 4}.get(case, 6 if words.model == "llama" else 0)


def test_a_score_is_of_the_merge_that_makes_a_token() -> None:
    words = vocabulary(HELD["one token by two merges"](), 999)
    score = dict(zip(words.tokens, words.scores, strict=True))
    assert (score["bc"], score["abc"], score["ab"]) == (0.0, -4.0, -5.0)


@READER
def test_where_a_model_stops_besides(tmp_path: Path) -> None:
    from gguf import GGUFReader

    tokenizer = added(by_bytes(), "<|im_end|>", "<x>", "<y>", "<z>", special=True)
    im_end, x, y, z = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<x>", "<y>", "<z>"])
    model = llama_for(tokenizer)
    given = {"scheme": "fp", "tokenizer": tokenizer, "check": False}
    stops = GenerationConfig(eos_token_id=[im_end, x, 2, y])
    written = gguf(model, tmp_path / "a", generation_config=stops, **given)
    fields = GGUFReader(written.path / MODEL).fields
    names = ("eos", "eot", "eom")
    found = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in names]
    assert found == [2, x, y]  # llama.cpp finds <|im_end|> by its text
    stops = GenerationConfig(eos_token_id=[x, y, z])
    with pytest.raises(ExportError, match=r"cannot hold the ends .*leave some out"):
        gguf(model, tmp_path / "b", generation_config=stops, **given)
    model.generation_config = stops  # known before a conversion
    with pytest.raises(ExportError, match="cannot hold the ends"):
        check_tokenizer(tokenizer, model)


KINDS: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
WINDOW = {"sliding_window": 8, "use_sliding_window": True}
UNUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "a window of no layer": ("qwen2", {**WINDOW, "layer_types": ["full_attention"]}),
    "a window above all layers": ("qwen3", {**WINDOW, "max_window_layers": 9, "head_dim": 128}),
    "a window of Llama": ("llama", WINDOW),
    "biases of Mistral": ("mistral", {"attention_bias": True, "sliding_window": None}),
    "biases of an MLP": ("qwen2", {"mlp_bias": True}),
    "swish": ("llama", {"hidden_act": "swish"}),
    "a base in both places": (
        "llama", {"rope_theta": 7e5, "rope_parameters": {"rope_type": "default", "rope_theta": 3e5}}
    ),
    "a scale in another place": (
        "llama", {"rope_theta": 7e5, "rope_scaling": {"rope_type": "default"}}
    ),
}  # fmt: skip


@READER
@pytest.mark.parametrize("case", UNUSED)
def test_what_a_model_does_not_read_is_no_reason(case: str, tmp_path: Path) -> None:
    kind, options = UNUSED[case]
    config, model = KINDS[kind]
    made = build(model, config(**{**SIZES, **options}))
    randomize(made, 3)
    found = gguf(made, tmp_path / "out", scheme="fp").checked
    assert found.difference <= 1e-6 * found.largest


UNHELD: dict[str, tuple[str, dict[str, Any], str]] = {
    "a window": ("qwen2", {**WINDOW, "max_window_layers": 0}, "attends to 8 tokens only"),
    "a window of Mistral": ("mistral", {"sliding_window": 8}, "attends to 8 tokens only"),
    "biases": ("qwen3", {"attention_bias": True}, "its linears have biases"),
    "heads of Qwen 2": ("qwen2", {"head_dim": 32}, "heads are of 32, and transformers takes"),
    "heads of Qwen 3": ("qwen3", {"head_dim": 32}, "of 128 in a file of qwen3: --no-check"),
}


@READER
@pytest.mark.parametrize("case", UNHELD)
def test_what_a_model_reads_is_refused(case: str, tmp_path: Path) -> None:
    kind, options, said = UNHELD[case]
    config, model = KINDS[kind]
    with pytest.raises(ExportError, match=said):
        gguf(build(model, config(**{**SIZES, **options})), tmp_path / "out", scheme="fp")
    assert list(tmp_path.iterdir()) == []


@READER
def test_what_only_a_check_would_read_is_no_reason_without_one(tmp_path: Path) -> None:
    made = build(Qwen3ForCausalLM, Qwen3Config(**{**SIZES, "head_dim": 32}))
    randomize(made, 3)
    made.save_pretrained(tmp_path / "model")
    streamed = fxquant.load_model(tmp_path / "model", streamed=True, tokenizer=False).graph
    found = gguf(streamed, tmp_path / "out", scheme="w4-g32-fp16").checked
    assert "streamed" in found.skipped


def test_a_name_is_no_path_and_none_that_llama_cpp_treats() -> None:
    assert title("/home/someone/models/tiny", "llama") == "tiny"
    assert title("owner/tiny", "llama") == "tiny"
    assert title("owner/Phi-3-as-Llama", "llama") == "llama"


@READER
def test_float64_is_refused(tmp_path: Path) -> None:
    model = build(LlamaForCausalLM, LlamaConfig(**SIZES)).double()
    for scheme in ("fp", "w4-g32-fp16"):
        with pytest.raises(ExportError, match="in float64"):
            gguf(model, tmp_path / "out", scheme=scheme)


@READER
def test_the_nearest_is_held(tmp_path: Path) -> None:
    """What is said to be nearest is not refused in its turn."""
    model = build(LlamaForCausalLM, LlamaConfig(**{**SIZES, "intermediate_size": 100}))
    with pytest.raises(ExportError, match=r"do not divide its 100 columns.*: fp there"):
        gguf(model, tmp_path / "out", scheme='{"scheme": "fp", "overrides": {"*.down_proj": "w8"}}')
    for scheme, nearest in (("w4a8-dynamic-token", "w4-g32-fp16"), ("w3", "w4-g32-fp16")):
        with pytest.raises(ExportError, match=f"nearest that it can: {nearest}$"):
            gguf(model, tmp_path / "out", scheme=scheme)
    held = '{"scheme": "w4-g32-fp16", "overrides": {"*.down_proj": "fp"}}'
    assert gguf(model, tmp_path / "out", scheme=held).checked.passed
