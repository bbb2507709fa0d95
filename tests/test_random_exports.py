"""Random schemes on small models: each format holds one and its engine agrees, or says why not."""

from __future__ import annotations

import random
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

import fxquant
from fxquant.errors import ExportError, FxquantError
from fxquant.exports.table import FORMATS
from fxquant.schemes.scheme import Scheme
from tests.architectures import gpt2
from tests.models import small_opt
from tests.test_export_compressed import batches, tiny_llama

ENGINES = pytest.mark.needs_program(
    all(find_spec(name) for name in ("onnxruntime", "compressed_tensors")), "the exports extra"
)
COUNT, SHORT = 200, 4
COMPILED = 8  # of aoti, a compile each
WEIGHTS = ("w8", "w4", "w3", "w5", "w8-tensor", "w4-g16", "w4-g32", "w3-g7", "w4-g24", "w8-g32")
FLOATS = (
    *("wfp8", "fp8", "fp8-static", "wmxfp4", "mxfp4", "wnvfp4", "nvfp4", "w4-g16-e4m3"),
    *("w4-g32-e8m0", "mxfp8", "mxfp6-rceil", "wmxfp6", "we4m3-g16/ae4m3-dynamic-g8", "we5m2"),
    *("w4-g16/afp8", "we2m1-g16-e8m0", "wmxfp4/amxfp8", "we4m3/a8-dynamic-token"),
)
INPUTS = ("a8-static", "a8-static:absmax", "a8-dynamic", "a8-dynamic-token", "a6-dynamic", "a8-g16")
REPAIRS = (
    *("+smooth", "+gptq", "+equalize", "+rotate(online=false)", "+rotate", "+correct_bias"),
    *("+kv8", "+attn8", "+split_outliers"),
)


def random_scheme(seed: int) -> str:
    draw = random.Random(seed)
    text = draw.choice((*WEIGHTS, *WEIGHTS, *FLOATS))
    if text in WEIGHTS:
        text += draw.choice(("", "-asym"))
        if draw.random() < 0.5:
            text += f"/{draw.choice(INPUTS)}{draw.choice(('', '-asym'))}"
    if draw.random() < 0.3:
        text += draw.choice(REPAIRS)
    return text


@cache
def model(index: int) -> PreTrainedModel:
    return (tiny_llama(), small_opt()[0], gpt2())[index]


def cells() -> list[Any]:
    """Every format, model and seed; slow, but for a few of what is checked at once."""
    return [
        pytest.param(
            *(target, which, seed),
            marks=[] if target == "compressed-tensors" and seed < SHORT else pytest.mark.slow,
        )
        for target in FORMATS
        for which in range(3)
        for seed in range(COMPILED if target == "aoti" else COUNT)
    ]


@ENGINES
@pytest.mark.parametrize(("target", "which", "seed"), cells())
def test_exported_and_equal_or_refused(target: str, which: int, seed: int, tmp_path: Path) -> None:
    scheme, data = random_scheme(seed), batches(model(which))
    try:
        Scheme.parse(scheme)
        fxquant.convert(model(which), scheme, calibration=data)
    except FxquantError:
        return  # no scheme, or none of this model: there is nothing to export
    try:
        found = FORMATS[target].export(
            model(which), tmp_path / "out", scheme=scheme, calibration=data
        )
    except ExportError as error:
        said = str(error)
        assert "nothing is written" not in said
        assert "cannot hold" in said or "nothing that the format is for" in said
        assert list(tmp_path.iterdir()) == []
        return
    assert found.checked.passed
    assert found.checked.skipped == ""
