"""Options, texts, tokenizers, masks and pickles that cannot be used: one sentence for each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.cli.main import main
from fxquant.errors import CalibrationError, DataError, FxquantError, ModelError
from fxquant.evaluation.source import tokens
from fxquant.evaluation.to_safetensors import to_safetensors
from fxquant.files.pickled import REPEATED_BYTES
from fxquant.frontends.weight_files import stored_weights
from tests.architectures import VOCABULARY, opt, token_ids
from tests.attack.bad import SHORT, edit_json, exit_code, refused, write_model
from tests.environments import by_version
from tests.hub_format import character_tokenizer, write_parquet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("bad") / "model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def evaluate(model: object, *more: object) -> tuple[object, ...]:
    return ("evaluate", "--model", model, "--schemes", "w8a8-static", *SHORT, *more)


NO_NUMBERS = ("x", "", "nan", "inf", "1e3", "1.5", "0x10", "1_0", "٣", " 3", "9" * 30, "--", "³")
BOUNDS = {
    "--seed": ("-1", 2**64, "-0x1", 10**19 * 2), "--windows": ("0", "-1", 2**63, "none"),
    "--length": ("0", "1", "-5", 2**40), "--stride": ("0", "-1", "17", 2**63),
    "--batch-size": ("0", "-1", 2**70), "--calibration-windows": ("-1", 2**40, 10**8),
    "--calibration-length": ("0", "1", "-1", 2**33), "--device": ("abacus", "", "meta", "cuda:x"),
    "--dtype": ("int8", ""), "--dataset": ("nothing", "", "c4"), "--text": ("", "/nowhere"),
    "--model": ("./nowhere", "/nowhere", ""), "--schemes": ("w9", "", "{", "w8+rotate(seed=-1)"),
}  # fmt: skip


@pytest.mark.parametrize("option", BOUNDS)
def test_bounds_of_options(option: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counted = option.strip("-") in ("seed", "windows", "length", "stride", "batch-size") or (
        option.startswith("--calibration")
    )
    for value in (*BOUNDS[option], *(NO_NUMBERS if counted else ())):
        refused(capsys, evaluate(model, f"{option}={value}"))


@pytest.mark.parametrize("seed", [0, 2**32, 2**63, 2**64 - 1])
def test_every_seed_within_the_bounds_serves(seed: int, model: Path) -> None:
    assert main([str(each) for each in evaluate(model, "--seed", seed)]) == 0


OTHERS = [
    ("explain", "--scheme=w8a8-dynamic", "--worst=-1"), ("explain", "--scheme=w8", "--worst=x"),
    *(("plan", f"--budget={value}") for value in ("nan", "inf", "-1", "1_0", "1e400", "x", "")),
    *(("plan", f"--bits={value}") for value in ("nan", "inf", "-1", "0", "3", "x", "")),
    ("plan",), ("plan", "--bits=5", "--budget=1"), ("plan", "--budget=1", "--choices", "w8"),
    ("plan", "--budget=1", "--cost=gold"),
    ("inspect", "--scheme=w8", "--layer=99"), ("inspect", "--scheme=w8", "--layer=-9"),
    ("inspect", "--scheme=w8", "--layer=" + "9" * 19), ("inspect", "--scheme=w8", "--layer=x"),
    ("inspect", "--scheme=w8", "--site=no"), ("convert", "--scheme=w8", "--level=fused"),
    ("explain", "--scheme=w8a8-static", "--seed=18446744073709551616"),
    ("plan", "--budget=1", "--calibration-length=0"), ("convert", "--scheme=w8", "--seed=-1"),
]  # fmt: skip


@pytest.mark.parametrize("arguments", OTHERS, ids=" ".join)
def test_options_of_the_other_commands(
    arguments: tuple[str, ...], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, (arguments[0], "--model", model, "--length", "16", *arguments[1:]))


@pytest.mark.parametrize(
    "name", ["", "../x", "a b", "/etc", "a/b", ".", "..", "-x", "no-such-thing", "torch", "os",
             "a\n", "a.b.c", "__main__", "ä", "x" * 300]
)  # fmt: skip
def test_packages_without_a_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, evaluate(f"package:{name}"), "package")


def test_arguments_that_are_no_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("\udcff", "a\0b"):
        refused(capsys, evaluate(model, "--text", text))
        refused(capsys, evaluate(text))
        refused(capsys, evaluate(model, "--output", text))


@pytest.mark.parametrize("value", ["\x1b[2J", "\u202ew8", "a\rb", "\x9b31m", "x" * 5000])
def test_values_that_a_terminal_obeys(
    value: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are printed as their codes."""
    given: list[tuple[object, ...]] = [
        evaluate(model, f"{option}={value}") for option in ("--text", "--dataset", "--device")
    ]
    given += [evaluate(model, f"--dtype={value}"), evaluate(f"./{value}")]
    given += [("convert", "--model", model, "--scheme", value), ("report", f"./{value}")]
    for command in given:
        code, written = exit_code(*command), capsys.readouterr().err
        assert code == 2
        assert "error: " in written
        assert all(line.isprintable() and len(line) < 6000 for line in written.splitlines())
        assert "\x9b" not in written


@pytest.mark.parametrize("half", ["\ud800", "\ude00\ud83d"])
def test_texts_with_half_a_character(half: str) -> None:
    text, tokenizer = f"many words of {half} " * 40, character_tokenizer()
    graph = fxquant.trace(opt())
    for given in (text, [text], ["some words " * 40, text]):
        with pytest.raises(DataError, match=r"text holds half a character, \\u\w+, at position 14"):
            fxquant.windows(given, tokenizer, length=16)
        with pytest.raises(DataError, match="text holds half a character"):
            fxquant.evaluate(graph, given, tokenizer)
    with pytest.raises(DataError, match="the text holds half a character"):
        tokens(text, tokenizer)


TEXTS: dict[str, Callable[[Path], object]] = {
    "latin-1.txt": lambda path: path.write_bytes("Müller ".encode("latin-1") * 400),
    "half.txt": lambda path: path.write_bytes(b"\xed\xa0\x80" * 400),
    "empty.txt": lambda path: path.touch(),
    "short.txt": lambda path: path.write_text("one word"),
    "folder.txt": lambda path: path.mkdir(),
    "pipe.txt": os.mkfifo,
    "loop.txt": lambda path: path.symlink_to(path),
    "pipe.parquet": os.mkfifo,
    "text.parquet": lambda path: path.write_text("no parquet"),
    "empty.parquet": lambda path: path.touch(),
    "cut.parquet": lambda path: path.write_bytes(b"PAR1" + bytes(9) + b"PAR1"),
    "rows.parquet": lambda path: write_parquet(path, "text", []),
    "number.parquet": lambda path: write_parquet(path, "n", [3]),  # type: ignore[list-item]
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TEXTS[name](tmp_path / name)
    refused(capsys, evaluate(model, "--dataset", tmp_path / name), name)
    if name.endswith(".txt"):
        refused(capsys, evaluate(model, "--text", tmp_path / name), name)
        refused(capsys, evaluate(model, "--calibration-dataset", tmp_path / name), name)
        refused(capsys, ("sweep", tmp_path / name), name)


TOKENIZERS = {
    "tokenizer.json": (b"", b"{}", b"[]", b"null", b"x", b"\xff", b'{"version":"1.0"}',
        b"[" * 9999, b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}',
        b'{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"z"}}'),
    "tokenizer_config.json": (b"", b"[]", b"{", b"\xff", b'{"tokenizer_class": 3}',
        # transformers 5 takes tokenizer.json, which says all by itself, whatever the class's name.
        *by_version((b'{"tokenizer_class": "Nope"}',), ()), b'{"added_tokens_decoder": {"x": 1}}',
        b'{"added_tokens_decoder": 3}', b'{"model_max_length": "x"}', b'{"auto_map": 3}',
        b'{"padding_side": "up"}'),
    "special_tokens_map.json": (b"", b"[]", b"x"),
    "added_tokens.json": (b"", b"[]"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / name).read_bytes() if (folder / name).exists() else None
    for content in TOKENIZERS[name]:
        (folder / name).write_bytes(content)
        for more in ((), ("--stream",)):
            refused(capsys, evaluate(folder, *more), str(folder))
    if before is not None:
        (folder / name).write_bytes(before)


def test_no_tokenizer_and_another_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_json(
        folder / "tokenizer.json",
        lambda data: data["model"]["vocab"].update({"e": VOCABULARY, "t": 2**31}),
    )
    for command in (evaluate(folder), ("plan", "--budget=1", "--model", folder, *SHORT),
                    ("explain", "--scheme=w8", "--model", folder, *SHORT)):  # fmt: skip
        refused(capsys, command, f"outside the vocabulary of {VOCABULARY}")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    refused(capsys, evaluate(folder), str(folder), "tokenizer")


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)


IDS = token_ids(2, 6)
MASKS: dict[str, Any] = {
    "nan": torch.full((2, 6), float("nan")), "one nan": ones(2, 6).float().index_fill(
        1, torch.tensor([3]), float("nan")),
    "inf": torch.full((2, 6), float("inf")), "fractions": torch.full((2, 6), 0.5),
    "token ids": IDS + 5, "two": 2 * ones(2, 6), "minus one": -ones(2, 6),
    "additive": torch.full((2, 6), torch.finfo(torch.float32).min), "shorter": ones(2, 5),
    "transposed": ones(6, 2), "flat": ones(12), "4d": ones(2, 1, 6, 6), "one row": ones(1, 6),
    "words": [["1"] * 6] * 2, "complex": ones(2, 6).to(torch.complex64),
    "sparse": ones(2, 6).to_sparse(),
    "meta": torch.ones(2, 6, device="meta"), "empty": ones(2, 0), "number": 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKS)
def test_masks_that_are_none(kind: str) -> None:
    batches = [{"input_ids": IDS, "attention_mask": MASKS[kind]}]
    for scheme in ("w8a8-static", "w4+gptq"):
        with pytest.raises(CalibrationError, match=r"batch 0: .*attention_mask"):
            fxquant.convert(opt(), scheme, calibration=batches)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.bfloat16])
def test_masks_of_any_dtype_mean_the_same(dtype: torch.dtype) -> None:
    mask = (torch.arange(6) < torch.tensor([[4], [6]])).to(torch.int64)
    found = [
        fxquant.convert(opt(), "w8a8-static", calibration=[{"input_ids": IDS, "attention_mask": m}])
        for m in (mask, mask.to(dtype))
    ]
    assert torch.equal(*(gm(input_ids=IDS) for gm in found))


PICKLES: dict[str, Callable[[], Any]] = {
    "integer keys": lambda: {1: torch.ones(2)}, "tuple keys": lambda: {("a",): torch.ones(2)},
    "sparse": lambda: {"a": torch.eye(3).to_sparse()},
    "compressed": lambda: {"a": torch.eye(3).to_sparse_csr()},
    "meta": lambda: {"a": torch.empty(3, device="meta")},
    "quantized": lambda: {"a": torch._empty_affine_quantized([3], scale=1.0, zero_point=0,
                                                           dtype=torch.qint8)},
    "repeated": lambda: {"a": torch.ones(1).expand(2**40)},
    "repeated rows": lambda: {"a": torch.ones(1, 4).expand(2**38, 4)},
    "complex": lambda: {"a": torch.ones(2, dtype=torch.complex64)},
    "8 bits": lambda: {"a": torch.ones(2).to(torch.float8_e4m3fn)},
    "no name": lambda: {"": torch.ones(2)}, "reserved": lambda: {"__metadata__": torch.ones(2)},
    "half a character": lambda: {"\ud800": torch.ones(2)},
    "control": lambda: {"\x1b[2J": torch.ones(2)}, "number": lambda: {"a": 3},
    "none": lambda: {"a": None}, "nested": lambda: {"a": {"b": ones(2)}},
    "list": lambda: [torch.ones(2)], "tensor": lambda: torch.ones(2), "text": lambda: "weights",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_of_something_else(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(PICKLES[kind](), tmp_path / "pytorch_model.bin")
    refused(capsys, ("safetensors", tmp_path), "pytorch_model.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        stored_weights(tmp_path)


def test_a_pickle_is_not_executed_and_small_repetitions_are_written(tmp_path: Path) -> None:
    for content in (
        b"",
        b"x",
        b"PK\x05\x06" + bytes(18),
        b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00xR.",
    ):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(FxquantError, match=r"pytorch_model\.bin"):
            to_safetensors(tmp_path)
    size = REPEATED_BYTES // 4
    torch.save({"a": torch.full((1,), 7.0).expand(size)}, tmp_path / "pytorch_model.bin")
    to_safetensors(tmp_path)
    assert torch.equal(stored_weights(tmp_path)["a"].read(), torch.full((size,), 7.0))
