"""Schemes as text, as JSON and as dataclasses: round trips, meanings, errors with a caret."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import FxquantError, SchemeError
from fxquant.formats.integer import integer
from fxquant.schemes.scheme import ROLES, Role, Scheme, as_scheme
from fxquant.schemes.specs import (
    DEFAULT_ESTIMATOR,
    FLOAT,
    ActivationSpec,
    Estimator,
    Granularity,
    SiteSpec,
    TensorSpec,
)
from fxquant.schemes.spelling import ALIASES, EXAMPLES, Options, spell_site

CHANNEL8 = TensorSpec(integer(8))
TENSOR8 = TensorSpec(integer(8), "tensor")
ASYM8 = TensorSpec(integer(8, symmetric=False), "tensor")
TOKEN8 = TensorSpec(integer(8), "token")
GROUP4 = TensorSpec(integer(4), "group", group_size=128)

SPELLINGS = {
    "fp": FLOAT,
    "w8": SiteSpec(CHANNEL8),
    "w4": SiteSpec(TensorSpec(integer(4))),
    "w2": SiteSpec(TensorSpec(integer(2))),
    "w8-tensor": SiteSpec(TENSOR8),
    "w8-asym": SiteSpec(TensorSpec(integer(8, symmetric=False))),
    "w8-tensor-asym": SiteSpec(ASYM8),
    "w4-g128": SiteSpec(GROUP4),
    "w4-g128-asym": SiteSpec(TensorSpec(integer(4, symmetric=False), "group", group_size=128)),
    "w8a8-dynamic": SiteSpec(CHANNEL8, ActivationSpec(TENSOR8)),
    "w8a8-dynamic-token": SiteSpec(CHANNEL8, ActivationSpec(TOKEN8)),
    "w8a8-dynamic-asym": SiteSpec(CHANNEL8, ActivationSpec(ASYM8)),
    "w8a8-dynamic-token-asym": SiteSpec(
        CHANNEL8, ActivationSpec(TensorSpec(integer(8, symmetric=False), "token"))
    ),
    "w8a8-static": SiteSpec(CHANNEL8, ActivationSpec(TENSOR8, Estimator("percentile", 99.9))),
    "w8a8-static:absmax": SiteSpec(CHANNEL8, ActivationSpec(TENSOR8, Estimator("absmax"))),
    "w8a8-static:mse": SiteSpec(CHANNEL8, ActivationSpec(TENSOR8, Estimator("mse"))),
    "w8a8-static:entropy": SiteSpec(CHANNEL8, ActivationSpec(TENSOR8, Estimator("entropy"))),
    "w8a8-static:p99.99": SiteSpec(
        CHANNEL8, ActivationSpec(TENSOR8, Estimator("percentile", 99.99))
    ),
    "w8a8-static:p99": SiteSpec(CHANNEL8, ActivationSpec(TENSOR8, Estimator("percentile", 99))),
    "w8a8-static:p100": SiteSpec(CHANNEL8, ActivationSpec(TENSOR8, Estimator("percentile", 100))),
    "w8a8-static-asym": SiteSpec(CHANNEL8, ActivationSpec(ASYM8, DEFAULT_ESTIMATOR)),
    "w8a8-static-asym:mse": SiteSpec(CHANNEL8, ActivationSpec(ASYM8, Estimator("mse"))),
    "w4a8-dynamic": SiteSpec(TensorSpec(integer(4)), ActivationSpec(TENSOR8)),
    "w4-g128/a8-dynamic-token": SiteSpec(GROUP4, ActivationSpec(TOKEN8)),
    "w8-tensor/a4-static:p99.99": SiteSpec(
        TENSOR8,
        ActivationSpec(TensorSpec(integer(4), "tensor"), Estimator("percentile", 99.99)),
    ),
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_spelling_and_its_meaning(text: str) -> None:
    scheme = Scheme.parse(text)
    assert scheme == Scheme(SPELLINGS[text])
    assert str(scheme) == text


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("w8/a8-static", "w8a8-static"),
        ("w8/a8-dynamic-token", "w8a8-dynamic-token"),
        ("w8a8-static:p99.9", "w8a8-static"),
        ("w8a8-static:p99.90", "w8a8-static"),
        ("w8a8-static:p100.0", "w8a8-static:p100"),
        ("  w8\n", "w8"),
        ('{"scheme": "w8"}', "w8"),
        ('{"scheme": "w8/a8-static", "overrides": {}}', "w8a8-static"),
    ],
)
def test_other_spellings_print_in_one_form(text: str, printed: str) -> None:
    assert str(Scheme.parse(text)) == printed


@pytest.mark.parametrize(
    ("text", "repairs"),
    [
        ("fp32-gemm", ()),
        ("fp+rotate", (("rotate", ()),)),
        ("w8a8-static:absmax+smooth(alpha=0.5)", (("smooth", (("alpha", 0.5),)),)),
        ("w4-g128+awq+gptq(order=static)", (("awq", ()), ("gptq", (("order", "static"),)))),
        ("w8a8-dynamic-token+attn8+kv8", (("attn8", ()), ("kv8", ()))),
        (
            "w8+p(a=1,b=-2,c=1e-05,d=true,e=false,f=x.y-z)",
            (("p", (("a", 1), ("b", -2), ("c", 1e-5), ("d", True), ("e", False), ("f", "x.y-z"))),),
        ),
    ],
)
def test_repairs(text: str, repairs: tuple[tuple[str, Options], ...]) -> None:
    scheme = Scheme.parse(text)
    assert scheme.repairs == repairs
    # 1 == 1.0 == True in Python, so look at the types too.
    assert repr(scheme.repairs) == repr(repairs)
    assert str(scheme) == text
    assert scheme.fp32_gemm is (text == "fp32-gemm")


def test_the_spellings_that_errors_list_are_valid() -> None:
    for example in EXAMPLES.split(", "):
        start, _, alternatives = example.partition(":")
        for estimator in alternatives.split("|"):
            Scheme.parse(start + (f":{estimator}" if estimator else ""))


# --- round trips over all schemes -----------------------------------------------------------------

BITS = st.integers(2, 8)
GROUP_SIZES = st.integers(1, 4096)


@st.composite
def weights(draw: st.DrawFn) -> TensorSpec:
    granularities: tuple[Granularity, ...] = ("tensor", "channel", "group")
    granularity = draw(st.sampled_from(granularities))
    size = draw(GROUP_SIZES) if granularity == "group" else None
    return TensorSpec(integer(draw(BITS), draw(st.booleans())), granularity, size)


ESTIMATORS = st.one_of(
    st.sampled_from([Estimator("absmax"), Estimator("mse"), Estimator("entropy")]),
    st.floats(50, 100, exclude_min=True).map(lambda p: Estimator("percentile", p)),
    st.integers(51, 100).map(lambda p: Estimator("percentile", p)),
)


@st.composite
def activations(draw: st.DrawFn) -> ActivationSpec:
    estimator = draw(st.none() | ESTIMATORS)
    granularities: tuple[Granularity, ...] = ("tensor",) if estimator else ("tensor", "token")
    granularity = draw(st.sampled_from(granularities))
    return ActivationSpec(
        TensorSpec(integer(draw(BITS), draw(st.booleans())), granularity), estimator
    )


SITES = st.one_of(st.just(FLOAT), st.builds(SiteSpec, weights(), st.none() | activations()))
WEIGHT_ONLY = st.one_of(st.just(FLOAT), st.builds(SiteSpec, weights()))
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True)
VALUES = st.one_of(
    st.integers(1 - 2**64, 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,8}", fullmatch=True).filter(
        lambda word: word not in ("true", "false")
    ),
)
REPAIRS = st.lists(
    st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3).map(lambda d: tuple(d.items()))),
    max_size=3,
).map(tuple)
PATTERNS = st.one_of(
    st.sampled_from(["head", "*.fc2", "*", "model.layers.[0-3].*"]),
    st.text().filter(lambda p: p != "embeddings"),
)


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    repairs = draw(REPAIRS)
    if draw(st.booleans()) and draw(st.booleans()):
        return Scheme(repairs=repairs, fp32_gemm=True)
    overrides = draw(
        st.dictionaries(PATTERNS.filter(lambda p: p != "embeddings"), SITES, max_size=3)
    )
    if draw(st.booleans()):
        overrides["embeddings"] = draw(WEIGHT_ONLY)
    return Scheme(draw(SITES), repairs, tuple(overrides.items()))


@given(schemes())
@settings(deadline=None, max_examples=120)
def test_scheme_to_text_to_scheme(scheme: Scheme) -> None:
    text = str(scheme)
    again = Scheme.parse(text)
    assert again == scheme
    assert repr(again.repairs) == repr(scheme.repairs)
    assert str(again) == text
    assert text.startswith("{") == bool(scheme.overrides)


@given(schemes())
@settings(deadline=None, max_examples=40)
def test_scheme_to_json_to_scheme(scheme: Scheme) -> None:
    data = json.loads(scheme.to_json())
    assert set(data) == {"scheme", "overrides"}
    assert Scheme.from_json(scheme.to_json()) == scheme


GRAMMAR = re.compile(
    r"w(?P<bits>\d)(?P<grain>-tensor|-g\d+)?(?P<asym>-asym)?"
    r"(/?a(?P<a_bits>\d)-(?P<source>dynamic(?P<token>-token)?|static)(?P<a_asym>-asym)?"
    r"(:(?P<estimator>.+))?)?"
)


@given(st.builds(SiteSpec, weights(), st.none() | activations()))
@settings(deadline=None, max_examples=150)
def test_the_text_of_a_site_says_all_of_it(spec: SiteSpec) -> None:
    # Read by one regular expression, not by the library's scanner.
    found = GRAMMAR.fullmatch(spell_site(spec))
    assert found
    assert spec.weight is not None
    grain = {"channel": None, "tensor": "-tensor"}.get(
        spec.weight.granularity, f"-g{spec.weight.group_size}"
    )
    assert (int(found["bits"]), found["grain"]) == (spec.weight.grid.bits, grain)
    assert (found["asym"] is None) is (not spec.weight.grid.has_zero_point)
    assert (found["source"] is None) is (spec.activation is None)
    if spec.activation is not None:
        assert int(found["a_bits"]) == spec.activation.tensor.grid.bits
        assert found["source"].startswith("dynamic") is spec.activation.dynamic
        assert (found["token"] is not None) is (spec.activation.tensor.granularity == "token")
        assert (found["a_asym"] is None) is (not spec.activation.tensor.grid.has_zero_point)
        assert (found["estimator"] is None) is (
            spec.activation.estimator in (None, DEFAULT_ESTIMATOR)
        )


@given(st.text(alphabet="wagpt0128-/+:.=(),symdn{}\"' ", max_size=25))
@settings(deadline=None, max_examples=300)
def test_any_text_is_a_scheme_or_a_scheme_error(text: str) -> None:
    try:
        scheme = Scheme.parse(text)
    except SchemeError:
        return
    assert Scheme.parse(str(scheme)) == scheme


# --- errors ---------------------------------------------------------------------------------------

#           text                              column of the caret, part of the message
BAD_TEXT = {
    "": (0, 'expected "fp", "fp32-gemm" or a weight'),
    "int8": (0, 'expected "fp", "fp32-gemm" or a weight'),
    "W8": (0, 'expected "fp", "fp32-gemm" or a weight'),
    "a8-dynamic": (0, 'expected "fp", "fp32-gemm" or a weight'),
    "fp16": (2, "unexpected text"),
    "fp32-gemm/a8-dynamic": (9, "unexpected text"),
    "w": (1, "a number of bits"),
    "w1": (1, "bits must be 2..8, got 1"),
    "w16": (1, "bits must be 2..8, got 16"),
    "w8 a8": (2, "unexpected text"),
    "w8-foo": (2, "unexpected text"),
    "w8-asym-tensor": (7, "unexpected text"),
    "w4-g": (4, "a group size"),
    "w4-g-asym": (4, "a group size"),
    "w8/": (3, 'expected an activation such as "a8-dynamic"'),
    "w8/8-dynamic": (3, 'expected an activation such as "a8-dynamic"'),
    "w8a8": (4, '"-dynamic" or "-static"'),
    "w8a9-static": (3, "bits must be 2..8, got 9"),
    "w8a8-statik": (4, '"-dynamic" or "-static"'),
    "w8a8-static-token": (11, "unexpected text"),
    "w8a8-dynamic-asym-token": (17, "unexpected text"),
    "w8a8-dynamic:absmax": (12, "for static activations only"),
    "w8a8-dynamic-token:p99": (18, "for static activations only"),
    "w8a8-static:": (12, "expected an estimator"),
    "w8a8-static:max": (12, "expected an estimator"),
    "w8a8-static:p": (13, "a percentile such as 99.9"),
    "w8a8-static:p50": (13, "percentile must be above 50"),
    "w8a8-static:p100.1": (13, "percentile must be above 50"),
    "w8a8-static:absmaximum": (18, "unexpected text"),
    "w8-tensora8-dynamic": (9, "unexpected text"),
    "w8+": (3, "the name of a pass"),
    "w8+Smooth": (3, "the name of a pass"),
    "w8+smooth(": (10, "the name of an option"),
    "w8+smooth()": (10, "the name of an option"),
    "w8+smooth(alpha)": (15, 'expected "="'),
    "w8+smooth(alpha=)": (16, "a value: a number, true, false or a word"),
    "w8+smooth(alpha=1": (17, 'expected "," or ")"'),
    "w8+smooth(alpha=1,)": (18, "the name of an option"),
    "w8+smooth(alpha=1,alpha=2)": (18, "option alpha is given twice"),
    "w8+smooth(alpha=1)x": (18, "unexpected text"),
}


@pytest.mark.parametrize("text", BAD_TEXT)
def test_the_caret_stands_where_the_text_stops_making_sense(text: str) -> None:
    column, message = BAD_TEXT[text]
    with pytest.raises(SchemeError) as caught:
        Scheme.parse(text)
    first, shown, caret, known = str(caught.value).split("\n")
    assert message in first
    assert shown == f"  {text}"
    assert caret == "  " + " " * column + "^"
    assert EXAMPLES in known


def test_the_caret_counts_from_the_stripped_text() -> None:
    with pytest.raises(SchemeError, match=r"\n  w8-foo\n    \^\n"):
        Scheme.parse("   w8-foo ")


def test_the_caret_of_a_group_size_of_zero() -> None:
    with pytest.raises(SchemeError, match=r"at least 1, got 0\n  w4-g0\n      \^\n"):
        Scheme.parse("w4-g0")


def test_scheme_errors_are_value_errors_of_ours() -> None:
    with pytest.raises(ValueError, match="not understood") as caught:
        as_scheme("w99")
    assert isinstance(caught.value, FxquantError)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        '{"overrides": {}}',
        '{"scheme": "w8", "overrides": 5}',
        '{"scheme": "w8", "overrides": ["head"]}',
        '{"scheme": "w8", "overrides": {"head": 8}}',
        '{"scheme": "w8", "overrides": {"head": null}}',
    ],
)
def test_json_of_another_form(text: str) -> None:
    with pytest.raises(SchemeError, match=r'scheme JSON not understood.*\{"scheme": "w8"'):
        Scheme.parse(text)


@pytest.mark.parametrize("spec", ["w8+smooth", "fp32-gemm", '{"scheme": "w8"}+x', "w99"])
def test_an_override_is_one_sites_spec(spec: str) -> None:
    with pytest.raises(SchemeError):
        Scheme.parse(json.dumps({"scheme": "w8", "overrides": {"head": spec}}))


@pytest.mark.parametrize("base", [5, None, ["w8"]])
def test_json_whose_scheme_is_no_text(base: object) -> None:
    with pytest.raises(SchemeError):
        Scheme.parse(json.dumps({"scheme": base}))


@pytest.mark.parametrize("key", ["overides", "repairs"])
def test_json_with_an_unknown_key(key: str) -> None:
    with pytest.raises(SchemeError, match=key):
        Scheme.parse(json.dumps({"scheme": "w8", key: {"head": "w8"}}))


def test_json_inside_json() -> None:
    inner = json.dumps({"scheme": "w8", "overrides": {"head": "w8"}})
    with pytest.raises(SchemeError):
        Scheme.parse(json.dumps({"scheme": inner}))


def test_a_pattern_given_twice_is_refused() -> None:
    w8, w4 = SiteSpec(CHANNEL8), SiteSpec(TensorSpec(integer(4)))
    with pytest.raises(SchemeError, match=r"'\*'"):
        Scheme(w8, overrides=(("*", w8), ("a", w4), ("*", FLOAT)))


# --- combinations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [-8, 0, 1, 9, 16])
def test_bits_outside_2_to_8(bits: int) -> None:
    with pytest.raises(SchemeError, match=r"bits must be 2\.\.8"):
        TensorSpec(integer(bits))


def test_group_and_group_size_go_together() -> None:
    with pytest.raises(SchemeError, match="go together"):
        TensorSpec(integer(4), "group")
    with pytest.raises(SchemeError, match="go together"):
        TensorSpec(integer(4), "channel", group_size=128)
    with pytest.raises(SchemeError, match="at least 1"):
        TensorSpec(integer(4), "group", group_size=0)


@pytest.mark.parametrize("percent", [50, 0, -1, 100.01, float("nan")])
def test_percent_in_50_to_100(percent: float) -> None:
    with pytest.raises(SchemeError, match="above 50 and at most 100"):
        Estimator("percentile", percent)


def test_percent_and_percentile_go_together() -> None:
    with pytest.raises(SchemeError, match="has a percent"):
        Estimator("percentile")
    with pytest.raises(SchemeError, match="has a percent"):
        Estimator("absmax", 99.9)


def test_activations_have_no_channel_scales_and_static_ones_no_groups() -> None:
    channel = TensorSpec(integer(8, symmetric=True), "channel")
    group = TensorSpec(integer(8, symmetric=True), "group", 4)
    for tensor, estimator in (
        (channel, None),
        (channel, DEFAULT_ESTIMATOR),
        (group, DEFAULT_ESTIMATOR),
    ):
        with pytest.raises(SchemeError, match=f"not per {tensor.granularity}"):
            ActivationSpec(tensor, estimator)


def test_static_ranges_are_per_tensor() -> None:
    with pytest.raises(SchemeError, match="static activation is per tensor, not per token"):
        ActivationSpec(TOKEN8, DEFAULT_ESTIMATOR)


def test_sites() -> None:
    with pytest.raises(SchemeError, match="only together with its weight"):
        SiteSpec(None, ActivationSpec(TENSOR8))
    with pytest.raises(SchemeError, match="not per token"):
        SiteSpec(TOKEN8)


def test_fp32_gemm_excludes_other_specs() -> None:
    with pytest.raises(SchemeError, match="takes no other spec"):
        Scheme(SiteSpec(CHANNEL8), fp32_gemm=True)
    with pytest.raises(SchemeError, match="takes no other spec"):
        Scheme(overrides=(("head", FLOAT),), fp32_gemm=True)


def test_an_embedding_has_no_activation() -> None:
    with pytest.raises(SchemeError, match="no activation"):
        Scheme(overrides=(("embeddings", SiteSpec(CHANNEL8, ActivationSpec(TENSOR8))),))


# --- which spec counts ----------------------------------------------------------------------------

FC1, FC2 = "model.decoder.layers.3.fc1", "model.decoder.layers.3.fc2"
EMBEDDING = "model.decoder.embed_tokens"


@pytest.mark.parametrize(
    ("overrides", "path", "role", "wanted"),
    [
        ({}, FC1, "linear", "w8"),
        ({}, "lm_head", "head", "fp"),
        ({}, "model.decoder.embed_tokens", "embeddings", "fp"),
        ({"head": "w4"}, "lm_head", "head", "w4"),
        ({"head": "w4"}, FC1, "linear", "w8"),
        ({"embeddings": "w4"}, "model.decoder.embed_tokens", "embeddings", "w4"),
        ({"embeddings": "w4"}, "lm_head", "head", "fp"),
        ({"*.fc2": "fp"}, FC2, "linear", "fp"),
        ({"*.fc2": "fp"}, FC1, "linear", "w8"),
        ({"*.FC2": "fp"}, FC2, "linear", "w8"),
        ({FC1: "w4"}, FC1, "linear", "w4"),
        ({"fc1": "w4"}, FC1, "linear", "w8"),
        ({"*.layers.[0-3].*": "w4"}, FC1, "linear", "w4"),
        ({"*.layers.[4-9].*": "w4"}, FC1, "linear", "w8"),
        ({"*.layers.?.fc1": "w4"}, FC1, "linear", "w4"),
        ({"*": "w4", "*.fc1": "w2"}, FC1, "linear", "w2"),
        ({"*.fc1": "w2", "*": "w4"}, FC1, "linear", "w4"),
        ({"*": "w4", "*.fc1": "w2"}, FC2, "linear", "w4"),
        ({"lm_head": "w4", "head": "w2"}, "lm_head", "head", "w2"),
        # A star covers all that has an input, so no embedding: docs/schemes.md.
        ({"*": "w4"}, "lm_head", "head", "w4"),
        ({"*": "w8a8-dynamic"}, "model.decoder.layers.3.self_attn.qk", "matmul", "w8a8-dynamic"),
        ({"*": "w4"}, EMBEDDING, "embeddings", "fp"),
        ({"*embed_tokens": "w4"}, EMBEDDING, "embeddings", "fp"),
        ({EMBEDDING: "w4"}, EMBEDDING, "embeddings", "w4"),
        ({"embeddings": "w4", "*": "w2"}, EMBEDDING, "embeddings", "w4"),
        # A role's name is no glob: a linear that is called like one is another site.
        ({"head": "w4"}, "head", "linear", "w8"),
    ],
)
def test_spec_for(overrides: dict[str, str], path: str, role: Role, wanted: str) -> None:
    scheme = Scheme.parse(json.dumps({"scheme": "w8", "overrides": overrides}))
    assert spell_site(scheme.spec_for(path, role)) == wanted


def test_a_glob_for_an_embedding_says_what_to_write() -> None:
    scheme = Scheme.parse('{"scheme": "w8", "overrides": {"*.embed_tokens": "w4"}}')
    with pytest.raises(SchemeError, match=rf"{EMBEDDING} is an embedding: write 'embeddings' or"):
        scheme.check_overrides([(FC1, "linear"), (EMBEDDING, "embeddings")])
    with pytest.raises(SchemeError, match=r"layers\.3\.fc1$"):
        scheme.check_overrides([(FC1, "linear")])


def test_roles() -> None:
    assert ROLES == ("linear", "head", "embeddings", "matmul")


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("fp", False),
        ("w8", False),
        ("w8a8-dynamic-token", False),
        ("w8a8-static", True),
        ("w8a8-static:absmax", True),
        ('{"scheme": "w8", "overrides": {"head": "w8a8-static"}}', True),
        ('{"scheme": "w8a8-dynamic", "overrides": {"head": "w8"}}', False),
    ],
)
def test_needs_calibration(text: str, needed: bool) -> None:
    assert Scheme.parse(text).needs_calibration is needed


def test_specs_lists_every_spec_that_may_occur() -> None:
    scheme = Scheme.parse('{"scheme": "w8", "overrides": {"head": "w4", "*.fc2": "fp"}}')
    assert [spell_site(spec) for spec in scheme.specs] == ["w8", "w4", "fp"]


def test_as_scheme() -> None:
    scheme = Scheme.parse("w8")
    assert as_scheme(scheme) is scheme
    assert as_scheme("w8") == scheme


def test_schemes_are_values() -> None:
    assert len({Scheme.parse("w8"), Scheme.parse(" w8 "), Scheme(SiteSpec(CHANNEL8))}) == 1
    with pytest.raises(AttributeError):
        Scheme().spec = SiteSpec(CHANNEL8)  # type: ignore[misc]


@pytest.mark.parametrize("bits", range(2, 9))
def test_qrange(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    assert integer(bits).codes == (-top, top)
    assert integer(bits, symmetric=False).codes == (-top - 1, top)


@pytest.mark.parametrize("name", ALIASES)
def test_a_named_scheme_prints_what_it_stands_for(name: str) -> None:
    assert str(Scheme.parse(name)) == ALIASES[name]
    assert str(Scheme.parse(f"{name}+correct_bias")) == f"{ALIASES[name]}+correct_bias"
    assert Scheme.parse(json.dumps({"scheme": name, "overrides": {"head": "w8"}})).repairs
    with pytest.raises(SchemeError):
        Scheme.parse(f"{name}r")
