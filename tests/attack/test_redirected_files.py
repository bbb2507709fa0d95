"""A checkpoint folder is read from itself: none of its files sends the loading elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fxquant
from fxquant.errors import ModelError
from fxquant.frontends.pretrained import read_tokenizer
from tests.architectures import opt, token_ids
from tests.attack.bad import SHORT, edit_json, exit_code, refused, write_model
from tests.attack.mutations import sign
from tests.attack.watch import watched
from tests.hub_format import character_tokenizer

FILES = ("tokenizer_config.json", "special_tokens_map.json")
OTHER_TOKENIZER = "other.json"
REDIRECTIONS: dict[str, Callable[[str], Any]] = {
    "tokenizer_file": lambda other: other,
    "vocab_file": lambda other: other,
    "merges_file": lambda other: other,
    "spm_file": lambda other: other,
    "gguf_file": lambda other: other,
    "chat_template_file": lambda other: other,
    "fast_tokenizer_files": lambda _: ["tokenizer.3.0.0.json"],
    "__slow_tokenizer": lambda other: other,
    "tokenizer_object": lambda other: {"file": other},
    "init_inputs": lambda other: [other],
    "sp_model_kwargs": lambda other: {"model_file": other},
    "mecab_kwargs": lambda other: {"mecab_option": f"-r {other}"},
}
WRONG_KINDS: list[tuple[str, Any]] = [
    ("extra_special_tokens", 5),
    ("additional_special_tokens", 5),
    ("added_tokens_decoder", [1]),
    ("added_tokens_decoder", {"x": {"content": "a"}}),
    ("add_bos_token", "no"),
    ("bos_token", 5),
    ("model_max_length", "x"),
    ("model_max_length", -1),
    ("padding_side", 5),
    ("tokenizer_class", 5),
    ("tokenizer_class", "AutoModelForCausalLM"),
    ("tokenizer_class", "pipeline"),
    ("fast_tokenizer_files", 5),
]


def other_tokenizer(folder: Path) -> Path:
    """The folder's tokenizer.json with its letters in another order."""
    data = json.loads((folder / "tokenizer.json").read_text())
    names = list(data["model"]["vocab"])
    data["model"]["vocab"] = {name: index for index, name in enumerate([names[0], *names[:0:-1]])}
    path = folder.parent / OTHER_TOKENIZER
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("key", REDIRECTIONS)
def test_a_tokenizer_is_read_from_its_folder(key: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    character_tokenizer().save_pretrained(folder)
    plain = read_tokenizer(folder)("hello")["input_ids"]
    other = other_tokenizer(folder)
    (folder / "tokenizer.3.0.0.json").write_text(other.read_text())
    for file in FILES:
        (folder / file).touch()
        before = (folder / file).read_text() or "{}"
        (folder / file).write_text(before)
        edit_json(folder / file, lambda data: data.update({key: REDIRECTIONS[key](str(other))}))
        with pytest.raises(ModelError, match=rf"{file}: {key}"):
            read_tokenizer(folder)
        (folder / file).write_text(before)
    assert read_tokenizer(folder)("hello")["input_ids"] == plain


@pytest.mark.parametrize(("key", "value"), WRONG_KINDS, ids=str)
def test_a_tokenizer_s_values_are_of_their_kinds(key: str, value: Any, tmp_path: Path) -> None:
    character_tokenizer().save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", lambda data: data.update({key: value}))
    with pytest.raises(ModelError, match=str(tmp_path)):
        read_tokenizer(tmp_path)


def test_what_real_tokenizers_hold_is_taken(tmp_path: Path) -> None:
    character_tokenizer().save_pretrained(tmp_path)
    plain = read_tokenizer(tmp_path)("hello")["input_ids"]
    edit_json(
        tmp_path / "tokenizer_config.json",
        lambda data: data.update(
            name_or_path="/home/someone/model",
            special_tokens_map_file="/home/someone/special_tokens_map.json",
            vocab_file=None,
            fast_tokenizer_files=["tokenizer.json"],
            init_inputs=[],
            sp_model_kwargs={},
            add_prefix_space=None,
            model_max_length=10**30,
            auto_map={"AutoTokenizer": ["a.B", None]},
        ),
    )
    assert read_tokenizer(tmp_path)("hello")["input_ids"] == plain


def test_beside_a_saved_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "saved"
    graph = fxquant.convert(opt(), "w8a8-static", calibration=[token_ids(2, 12, seed=3)])
    fxquant.save(graph, saved, character_tokenizer())
    other = other_tokenizer(saved)
    edit_json(saved / "tokenizer_config.json", lambda data: data.update(tokenizer_file=str(other)))
    sign(saved)
    refused(
        capsys, ("evaluate", "--model", saved, *SHORT), "tokenizer_config.json", "tokenizer_file"
    )


def test_an_evaluation_opens_nothing_outside_the_folder(tmp_path: Path) -> None:
    folder, saved = write_model(tmp_path / "model"), tmp_path / "saved"
    fxquant.save(fxquant.convert(opt(), "w8"), saved, character_tokenizer())
    for place, more in ((folder, ("--schemes", "w8")), (saved, ())):
        command = ("evaluate", "--model", place, *more, *SHORT)
        assert exit_code(*command) == 0  # imports what it needs
        with watched(place) as seen:
            assert exit_code(*command) == 0
        opened = [path for event, path in seen if event == "open"]
        assert not [path for path in opened if Path(path).is_relative_to(tmp_path)], opened
        assert not [path for path in opened if path.endswith((".json", ".safetensors"))], opened
