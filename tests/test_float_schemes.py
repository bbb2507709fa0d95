"""Schemes of every grid: spelled, named, read back; and what has no spelling."""

from __future__ import annotations

import random

import pytest
import torch

from fxquant.errors import SchemeError, SpellingError
from fxquant.formats.table import GRIDS, SCALES
from fxquant.schemes.named import NAMED
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import ActivationSpec, Estimator, SiteSpec, TensorSpec
from fxquant.schemes.spelling import spell_site
from tests.test_random_schemes import tensor as tensor_spec

STANDS_FOR = {
    "fp8": "we4m3/ae4m3-dynamic-token",
    "fp8-static": "we4m3/ae4m3-static:absmax",
    "mxfp8": "we4m3-g32-e8m0/ae4m3-dynamic-g32-e8m0",
    "mxfp6": "we2m3-g32-e8m0/ae2m3-dynamic-g32-e8m0",
    "mxfp4": "we2m1-g32-e8m0/ae2m1-dynamic-g32-e8m0",
    "mxfp4-rceil": "we2m1-g32-e8m0-rceil/ae2m1-dynamic-g32-e8m0-rceil",
    "nvfp4": "we2m1-g16-e4m3/ae2m1-dynamic-g16-e4m3",
    "wfp8": "we4m3",
    "wmxfp4": "we2m1-g32-e8m0",
    "wmxfp8-even": "we4m3-g32-e8m0-even",
    "wnvfp4": "we2m1-g16-e4m3",
    "wmxfp4/amxfp8": "we2m1-g32-e8m0/ae4m3-dynamic-g32-e8m0",
    "wfp8/a8-static": "we4m3/a8-static",
    "w8/afp8": "w8/ae4m3-dynamic-token",
    "w4-g128/afp8-static": "w4-g128/ae4m3-static:absmax",
    "fp8+smooth(alpha=0.5)": "we4m3/ae4m3-dynamic-token+smooth(alpha=0.5)",
}


@pytest.mark.parametrize("text", STANDS_FOR)
def test_a_name_prints_what_it_stands_for(text: str) -> None:
    scheme = Scheme.parse(text)
    assert str(scheme) == STANDS_FOR[text]
    assert Scheme.parse(str(scheme)) == scheme


def test_names_stand_in_overrides_too() -> None:
    text = '{"scheme": "fp8", "overrides": {"head": "wnvfp4", "*.down_proj": "w4-g128/afp8"}}'
    scheme = Scheme.parse(text)
    assert '"head": "we2m1-g16-e4m3"' in str(scheme)
    assert Scheme.parse(str(scheme)) == scheme
    assert (
        scheme.spec_for("a.down_proj", "linear").activation == Scheme.parse("fp8").spec.activation
    )


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("fp8x", 3, "unexpected text"),
        ("fp8-dynamic", 3, "unexpected text"),
        ("wfp8-static", 4, "a weight has no static range"),
        ("wfp8-static/afp8", 4, "a weight has no static range"),
        ("we4m3-asym", 5, "e4m3 has no zero point"),
        ("we4m3ae4m3-dynamic", 5, "unexpected text"),
        ("we9", 1, "a number of bits or a grid"),
        ("we2m1-g0-e8m0", 7, "a group size must be at least 1"),
        ("we2m1-g16-e5m2", 9, "unexpected text"),
        ("we2m1-e8m0", 5, "unexpected text"),
        ("w4-g32-e8m0-asym", 11, "groups whose scales are e8m0 have no zero points"),
        ("w4-g32-e4m3-asym/a8-static", 11, "groups whose scales are e4m3 have no zero points"),
        ("w4-g32-e8m0/a8-dynamic-g16-e4m3-asym", 31, "groups whose scales are e4m3 have no zero"),
        ("wnf4-g32-e8m0-even", 8, "the rule even"),
        ("w4-g32-e8m0-even", 6, "the rule even"),
        ("we4m3/ae4m3-static-g32", 18, "unexpected text"),
        ("we4m3/a8-dynamic-g32-asym", 20, "groups of an input have no zero points"),
        ("we4m3/ae4m3-dynamic:absmax", 19, "for static activations only"),
        ("mxfp4-floor", 5, "unexpected text"),
        ("ae4m3-static", 0, "or a format"),
    ],
)
def test_errors_point_at_the_place(text: str, place: int, message: str) -> None:
    with pytest.raises(SpellingError) as caught:
        Scheme.parse(text)
    said = str(caught.value).splitlines()
    assert message in said[0]
    assert said[1] == f"  {text}"
    assert said[2] == "  " + " " * place + "^"


def test_specs_that_cannot_be_are_refused_by_their_parts() -> None:
    e2m1, e8m0 = GRIDS["e2m1"], SCALES["e8m0"]
    with pytest.raises(SchemeError, match="those of groups"):
        TensorSpec(e2m1, "channel", scale=e8m0)
    with pytest.raises(SchemeError, match="zero points"):
        TensorSpec(GRIDS["int4-asym"], "group", 32, e8m0)
    with pytest.raises(SchemeError, match="static activation is per tensor"):
        ActivationSpec(TensorSpec(e2m1, "group", 32, e8m0), Estimator("absmax"))


def test_random_schemes_of_all_grids_are_read_back() -> None:
    random_ = random.Random(torch.initial_seed())
    for _ in range(2000):
        weight = tensor_spec(random_, ("tensor", "channel", "group"))
        activation: ActivationSpec | None = None
        if random_.random() < 0.7:
            static = random_.random() < 0.3
            tensor = tensor_spec(random_, ("tensor",) if static else ("tensor", "token", "group"))
            if tensor.granularity == "group" and tensor.grid.has_zero_point:
                continue
            activation = ActivationSpec(tensor, Estimator("mse") if static else None)
        spec = SiteSpec(weight, activation)
        assert Scheme.parse(spell_site(spec)).spec == spec, spell_site(spec)


def test_every_name_is_a_scheme_of_its_weight_and_its_input() -> None:
    for name, named in NAMED.items():
        assert Scheme.parse(name).spec == SiteSpec(named.weight, named.activation)
        assert Scheme.parse(f"w8/a{name}").spec.activation == named.activation
