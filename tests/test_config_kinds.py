"""Which values a config.json's fields take: each kind with good and with bad ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, OPTConfig

import fxquant
from fxquant.errors import ModelError
from fxquant.files.doors import read_object
from fxquant.frontends.config_kinds import check_kinds, shown
from tests.architectures import opt, token_ids
from tests.environments import takes_numbers_for_truth

PATH = Path("folder/config.json")
NAN, INF = float("nan"), float("inf")
# kind: fields of it, good values, bad values, what the error says
KINDS: dict[str, tuple[tuple[str, ...], tuple[Any, ...], tuple[Any, ...], str]] = {
    "truth": (
        ("use_cache", "tie_word_embeddings", "enable_bias", "return_dict", "output_attentions"),
        (True, False, 0, 1, None),
        (2, -1, 1.0, 0.0, "true", "", [], {}, [True]),
        "must be true or false",
    ),
    "number": (
        ("init_std", "dropout"),
        (0, 0.5, 1, None),
        (NAN, INF, -INF, "0.1", "", True, False, [], [0.1], {}, 10**400),
        "must be",
    ),
    "share": (
        ("dropout", "attention_dropout", "layerdrop"),
        (0, 0.0, 1, 1.0, 0.3),
        (-0.1, 1.1, -1, 2),
        "must be from 0 to 1",
    ),
    "dtype": (
        ("dtype", "torch_dtype"),
        ("float32", "float16", "bfloat16", "float64", "torch.float16", "auto", None),
        ("int8", "load", "", 16, True, ["float32"], {}, "float8_e4m3fn", "torch.torch.float32"),
        "is no float dtype",
    ),
    "attention": (
        ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
        ("eager", "sdpa", "flash_attention_2", None),
        ("kernels-community/flash-attn", "", 3, True, ["eager"], {"text": "eager"}, "EAGER"),
        "is none of eager, sdpa",
    ),
    "other files": (
        ("transformers_weights", "gguf_file", "subfolder", "variant", "configuration_files",
         "base_model_name_or_path", "adapter_kwargs", "use_kernels", "kernel_config"),
        (None, False),
        ("", "x", "../x", True, 0, [], {}, {"a": 1}),
        "loaded in place of this folder's own files",
    ),
    "method": (
        ("to_dict", "from_pretrained", "update", "save_pretrained", "to_json_string"),
        (None,),
        (1, "x", False, {}),
        "is no field of a config",
    ),
    "whole": (
        ("ffn_dim", "pad_token_id", "some_size", "n_positions", "n_inner"),
        (0, 1, -1, 2**31 - 1, -(2**31), None, [1, 2]),
        (2**31, 10**400, -(2**31) - 1, [1, 2**40]),
        "must be at most 2147483647",
    ),
    "kinds": (("num_heads_x", "n_groups"), (0, 1_000_000), (1_000_001,), "at most 1000000"),
    "labels": (("num_labels",), (0, 2, 100_000), (100_001, 2**31), "at most 100000"),
    "experts": (
        ("num_experts", "num_local_experts", "n_routed_experts", "num_hidden_layers"),
        (1, 512, 10_000),
        (10_001, 10**6),
        "at most 10000",
    ),
    "finite": (("anything", "rope_theta"), (1e4, -1.5, 0.0), (NAN, INF, [0.0, NAN]), "finite"),
    "free": (("anything",), ("x", [], {}, True, {"a": None}, [["global", 1]], "é"), (), ""),
}  # fmt: skip
GOOD = [(kind, n, v) for kind, (names, good, _, _) in KINDS.items() for n in names for v in good]
BAD = [(kind, n, v) for kind, (names, _, bad, _) in KINDS.items() for n in names for v in bad]


def check(values: dict[str, Any]) -> None:
    check_kinds(PATH, {"model_type": "opt", **values})


@pytest.mark.parametrize(("kind", "name", "value"), GOOD, ids=lambda each: shown(each)[:30])
def test_a_value_of_its_kind(kind: str, name: str, value: Any) -> None:
    check({name: value})
    check({"text_config": {name: value}})


@pytest.mark.parametrize(("kind", "name", "value"), BAD, ids=lambda each: shown(each)[:30])
def test_a_value_of_another_kind(kind: str, name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=KINDS[kind][3]) as caught:
        check({name: value})
    assert str(caught.value).startswith(f"{PATH}: {name}")
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_below_another_config_the_place_is_named() -> None:
    with pytest.raises(ModelError, match=r"config\.json: text_config\.inner\.gguf_file"):
        check({"text_config": {"inner": {"gguf_file": "x"}}})
    with pytest.raises(ModelError, match=r"config\.json: a\\x1b\[2J must be"):
        check({"a\x1b[2J": NAN})


@pytest.mark.parametrize("kind", ["bert", "opt", "nope", None, 3, "rag", ["opt"]])
def test_a_model_type_whose_defaults_are_not_known(kind: Any) -> None:
    """The fields that every config has are known all the same."""
    check_kinds(PATH, {"model_type": kind, "return_dict": 0, "enable_bias_x": "x"})
    with pytest.raises(ModelError, match="return_dict must be true or false"):
        check_kinds(PATH, {"model_type": kind, "return_dict": "no"})


@pytest.mark.parametrize("config", [OPTConfig, LlamaConfig])
def test_what_transformers_writes_itself_is_taken(config: Any, tmp_path: Path) -> None:
    config(num_labels=7, torch_dtype="float16").save_pretrained(tmp_path)
    check_kinds(PATH, read_object(tmp_path / "config.json"))


@takes_numbers_for_truth
def test_0_and_1_mean_what_false_and_true_mean(tmp_path: Path) -> None:
    ids = token_ids(2, 7)
    for name in ("enable_bias", "do_layer_norm_before", "use_cache"):
        for number in (0, 1):
            values: list[Any] = [bool(number), number]
            expected, found = (fxquant.trace(opt(**{name: value})) for value in values)
            with torch.no_grad():
                assert torch.equal(expected(ids), found(ids)), (name, number)
