"""Options of passes: what annotations allow, from a scheme's text and from Python alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import pytest

import fxquant
from fxquant.errors import SchemeError
from fxquant.passes import Awq, Equalize, Gptq, Refine, Rotate, Smooth
from fxquant.pipeline.options import Bounds, Count, Positive, Seed, Share, check_options
from fxquant.recipes.repairs import REPAIRS
from fxquant.schemes.scheme import Scheme
from tests.architectures import token_ids


@dataclass(frozen=True)
class Several:
    count: Count = 1
    share: Share = 0.5
    positive: Positive = 1.0
    seed: Seed = 0
    plain: float = 0.0
    flag: bool = False
    text: str = ""
    word: Literal["a", "b", "c"] = "a"
    maybe: int | None = None
    either: Share | Literal["auto"] = 0.5
    pair: tuple[int, float] = (1, 0.5)
    many: tuple[Count, ...] = ()
    below: Annotated[float, Bounds(above=0, high=2)] = 1.0


GOOD = [
    ("count", 1),
    ("share", 0),
    ("share", 1.0),
    ("positive", 10),
    ("plain", -3),
    ("flag", True),
    ("word", "c"),
    ("maybe", None),
    ("either", "auto"),
    ("either", 1),
    ("pair", (2, 3)),
    ("many", (1, 2, 3)),
    ("below", 2),
    ("seed", 2**63 - 1),
]
BAD = [
    ("count", 0, "an integer of at least 1, got 0"),
    ("count", 1.5, "an integer of at least 1, got 1.5"),
    ("count", True, "an integer of at least 1, got True"),
    ("count", "2", "an integer of at least 1, got '2'"),
    ("count", None, "an integer of at least 1, got None"),
    ("share", 1.0001, "a number from 0 to 1, got 1.0001"),
    ("share", -0.1, "a number from 0 to 1, got -0.1"),
    ("share", False, "a number from 0 to 1, got False"),
    ("share", math.nan, "a number from 0 to 1, got nan"),
    ("positive", 0, "a number above 0, got 0"),
    ("positive", math.inf, "a number above 0, got inf"),
    ("positive", 10**400, "a number above 0, got an integer of 1329 bits"),
    ("plain", -math.inf, "a number, got -inf"),
    ("flag", 1, "true or false, got 1"),
    ("flag", "true", "true or false, got 'true'"),
    ("text", 3, "text, got 3"),
    ("word", "d", "a, b or c, got 'd'"),
    ("word", ("a",), "a, b or c, got ('a',)"),
    ("maybe", 1.0, "an integer or none, got 1.0"),
    ("either", "most", "a number from 0 to 1 or auto, got 'most'"),
    ("pair", (1,), "a tuple of an integer and a number, got (1,)"),
    ("pair", [1, 2], "a tuple of an integer and a number, got [1, 2]"),
    ("many", (1, 0), "a tuple of an integer of at least 1, got (1, 0)"),
    ("below", 2.5, "a number above 0 and of at most 2, got 2.5"),
    ("seed", -1, "an integer from 0 to 9223372036854775807, got -1"),
    ("text", 0.5 + 1j, "text, got (0.5+1j)"),
]


@pytest.mark.parametrize(("field", "value"), GOOD)
def test_what_an_annotation_allows(field: str, value: Any) -> None:
    check_options(Several(**{field: value}), "several")


@pytest.mark.parametrize(("field", "value", "said"), BAD)
def test_what_an_annotation_rules_out(field: str, value: Any, said: str) -> None:
    with pytest.raises(SchemeError) as caught:
        check_options(Several(**{field: value}), "several")
    assert str(caught.value) == f"several: {field} must be {said}"


@pytest.mark.parametrize(
    ("text", "kind", "options"),
    [
        ("refine(steps=1.5)", Refine, {"steps": 1.5}),
        ("refine(damping=-1)", Refine, {"damping": -1}),
        ("gptq(block_size=64.5)", Gptq, {"block_size": 64.5}),
        ("gptq(block_size=true)", Gptq, {"block_size": True}),
        ("gptq(damping=high)", Gptq, {"damping": "high"}),
        ("gptq(order=act)", Gptq, {"order": "act"}),
        ("gptq(within=1)", Gptq, {"within": 1}),
        ("rotate(seed=0.5)", Rotate, {"seed": 0.5}),
        ("rotate(seed=-1)", Rotate, {"seed": -1}),
        ("rotate(online=1)", Rotate, {"online": 1}),
        ("smooth(tokens=0.5)", Smooth, {"tokens": 0.5}),
        ("smooth(alpha=-0.1)", Smooth, {"alpha": -0.1}),
        ("awq(scale=0)", Awq, {"scale": 0}),
        ("equalize(threshold=0)", Equalize, {"threshold": 0}),
        ("equalize(iterations=2.5)", Equalize, {"iterations": 2.5}),
    ],
)
def test_text_and_python_give_the_same_error_before_any_work(
    text: str, kind: type[Any], options: dict[str, Any]
) -> None:
    def model() -> None:
        raise AssertionError("the model was looked at")

    scheme = f"w4a8-dynamic+{text}"
    with pytest.raises(SchemeError) as from_text:
        fxquant.convert(model, scheme, calibration=[token_ids(1, 5)])
    with pytest.raises(SchemeError) as from_python:
        kind(**options)
    assert str(from_text.value) == str(from_python.value)
    (option, value), name = next(iter(options.items())), text.partition("(")[0]
    assert str(from_text.value).startswith(f"{name}: {option} must be ")
    assert str(from_text.value).endswith(f", got {value!r}")


@pytest.mark.parametrize("name", REPAIRS)
def test_every_option_of_every_repair_is_checked(name: str) -> None:
    """No annotation lets an object pass that is neither number, word nor flag."""
    for each in fields(REPAIRS[name]):
        with pytest.raises(SchemeError, match=f"^{name}: {each.name} must be "):
            REPAIRS[name](**{each.name: object()})
        spelled = Scheme.parse(f"w8+{name}({each.name}=nonsense)")
        with pytest.raises(SchemeError, match=f"^{name}: {each.name} must be .*got 'nonsense'"):
            fxquant.recipe(spelled, calibration=[token_ids(1, 5)])


@pytest.mark.parametrize("value", [2**64, 10**30, 10**300])
def test_a_whole_number_that_no_text_can_say(value: int) -> None:
    with pytest.raises(SchemeError, match="tokens must be a number of at most 64 bits"):
        Smooth(tokens=value)
