"""The spelling of schemes: a scanner whose errors point at the place, and the way back to text.

docs/schemes.md has the whole grammar, from which the tests make texts. Elements and scales are
named in fxquant/formats/table.py, formats such as fp8 and mxfp4 in schemes/named.py.
"""

from __future__ import annotations

import math
import re
from typing import NoReturn

from fxquant.errors import SchemeError, SpellingError
from fxquant.formats.grid import Grid
from fxquant.formats.integer import IntegerGrid, integer
from fxquant.formats.scales import FP32, ScaleFormat
from fxquant.formats.table import GRIDS, SCALES
from fxquant.schemes.named import LONGEST_FIRST, NAMED, Named
from fxquant.schemes.specs import (
    DEFAULT_ESTIMATOR,
    ActivationSpec,
    Estimator,
    SiteSpec,
    TensorSpec,
)

OptionValue = str | int | float | bool
Options = tuple[tuple[str, OptionValue], ...]

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?")
_DIGITS = re.compile(r"[0-9]{1,9}")
_PERCENT = re.compile(r"[0-9]+(\.[0-9]+)?(e-?[0-9]+)?")
_LARGEST = 2**64 - 1  # of a seed, which is the largest number that an option can mean

EXAMPLES = (
    "fp, fp32-gemm, w8, w4-g128-asym, w8a8-dynamic, w8a8-dynamic-token, w8a8-static, "
    "w8a8-static:absmax|p99.99|mse|entropy, w8a8-static-asym, w4-g128/a8-dynamic-token, "
    "we4m3/ae4m3-dynamic-token, we2m1-g32-e8m0, fp8, fp8-static, mxfp8, mxfp6, mxfp4, nvfp4, wmxfp4"
)


# Named recipes and what they stand for; printing a scheme shows the latter.
ALIASES = {
    "w8a8-static-best": (
        "w8a8-static-asym:absmax+smooth(alpha=0.7,where=all)+split_outliers(threshold=4)"
    )
}


def expand_alias(text: str) -> str:
    """The text with a name of ALIASES in front replaced by what it stands for."""
    name, plus, rest = text.partition("+")
    return ALIASES.get(name.strip(), name) + plus + rest


class Scanner:
    """A position in a scheme's text. ``fail`` raises SpellingError with a caret under it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def accept(self, literal: str) -> bool:
        found = self.text.startswith(literal, self.position)
        self.position += len(literal) if found else 0
        return found

    def match(self, pattern: re.Pattern[str], expected: str) -> str:
        found = pattern.match(self.text, self.position)
        if not found:
            self.fail(f"expected {expected}")
        self.position = found.end()
        return found.group()

    def peek(self, pattern: str) -> bool:
        return re.compile(pattern).match(self.text, self.position) is not None

    def at_end(self) -> bool:
        return self.position == len(self.text)

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        caret = " " * (self.position if at is None else at) + "^"
        raise SpellingError(
            f"scheme not understood: {message}\n  {self.text}\n  {caret}\n"
            f"known: {EXAMPLES}; docs/schemes.md has the grammar"
        )


def scan_site(scanner: Scanner) -> SiteSpec:
    """Read ``weight ["/" activation]``, the short ``w8a8-...`` or the name of a format."""
    start = scanner.position
    both = _scan_name(scanner)
    if both is not None:
        return SiteSpec(both.weight, both.activation)
    weight = _scan_weight(scanner)
    # "w8a8" is short for "w8/a8"; behind "-g128" the slash must stand.
    plain = re.fullmatch(r"w\d+", scanner.text[start : scanner.position])
    joined = plain is not None and scanner.peek(r"a\d")
    activation = _scan_activation(scanner) if joined or scanner.accept("/") else None
    return SiteSpec(weight, activation)


def _scan_name(scanner: Scanner) -> Named | None:
    """A format that has a name of its own, None where there stands none."""
    return next((NAMED[name] for name in LONGEST_FIRST if scanner.accept(name)), None)


def _scan_element(scanner: Scanner) -> Grid:
    """A number of bits, or the name of a grid that is no integer's."""
    others = [name for name, grid in GRIDS.items() if not isinstance(grid, IntegerGrid)]
    for name in sorted(others, key=len, reverse=True):
        if scanner.accept(name):
            return GRIDS[name]
    start = scanner.position
    bits = int(scanner.match(_DIGITS, "a number of bits or a grid such as e4m3"))
    if not 2 <= bits <= 8:
        scanner.fail(f"bits must be 2..8, got {bits}", at=start)
    return integer(bits)


def _scan_zero_point(scanner: Scanner, grid: Grid) -> Grid:
    """The same grid with a zero point where the text goes on with ``-asym``."""
    start = scanner.position
    if not scanner.accept("-asym"):
        return grid
    if not isinstance(grid, IntegerGrid):
        scanner.fail(f"{grid.name} has no zero point", at=start)
    return integer(grid.bits, symmetric=False)


def _scan_weight(scanner: Scanner) -> TensorSpec:
    if not scanner.accept("w"):
        scanner.fail(
            'expected "fp", "fp32-gemm" or a weight such as "w8", or a format such as "fp8"'
        )
    named = _scan_name(scanner)
    if named is not None:
        if named.activation.estimator is not None:
            scanner.fail("a weight has no static range", at=scanner.position - len("-static"))
        return named.weight
    element = _scan_element(scanner)
    if scanner.accept("-tensor"):
        return TensorSpec(_scan_zero_point(scanner, element), "tensor")
    if scanner.peek("-g"):
        return _scan_groups(scanner, element, "weight")
    return TensorSpec(_scan_zero_point(scanner, element))


def _scan_groups(scanner: Scanner, element: Grid, of: str) -> TensorSpec:
    """Read ``-g32``, ``-g32-e8m0``, and ``-asym`` behind the former ``of`` a weight."""
    scanner.accept("-g")
    start = scanner.position
    group_size = int(scanner.match(_DIGITS, "a group size"))
    if group_size < 1:
        scanner.fail(f"a group size must be at least 1, got {group_size}", at=start)
    start = scanner.position
    found = [name for name in SCALES if name != FP32.name and scanner.peek(f"-{name}")]
    scale: ScaleFormat = FP32
    if found:
        name = max(found, key=len)
        scanner.accept(f"-{name}")
        scale = SCALES[name]
    if scanner.peek("-asym") and not (scale.zero_points and of == "weight"):
        held = f"whose scales are {scale.name}" if not scale.zero_points else f"of an {of}"
        scanner.fail(f"groups {held} have no zero points")
    try:
        return TensorSpec(_scan_zero_point(scanner, element), "group", group_size, scale)
    except SpellingError:
        raise
    except SchemeError as error:
        scanner.fail(str(error), at=start)


def _scan_activation(scanner: Scanner) -> ActivationSpec:
    if not scanner.accept("a"):
        scanner.fail('expected an activation such as "a8-dynamic"')
    named = _scan_name(scanner)
    if named is not None:
        return named.activation
    element = _scan_element(scanner)
    if not scanner.peek("-static|-dynamic"):
        scanner.fail('expected "-dynamic" or "-static"')
    static = scanner.accept("-static")
    if not static and scanner.accept("-dynamic") and scanner.peek("-g"):
        return ActivationSpec(_scan_groups(scanner, element, "input"))
    token = not static and scanner.accept("-token")
    grid = _scan_zero_point(scanner, element)
    estimator = None
    if scanner.peek(":") and not static:
        scanner.fail("a range estimator is for static activations only")
    if static:
        estimator = _scan_estimator(scanner) if scanner.accept(":") else DEFAULT_ESTIMATOR
    tensor = TensorSpec(grid, "token" if token else "tensor")
    return ActivationSpec(tensor, estimator)


def _scan_estimator(scanner: Scanner) -> Estimator:
    for kind in ("absmax", "mse", "entropy"):
        if scanner.accept(kind):
            return Estimator(kind)
    if not scanner.accept("p"):
        scanner.fail('expected an estimator: "absmax", "p99.9" (any percentile), "mse", "entropy"')
    start = scanner.position
    percent = float(scanner.match(_PERCENT, "a percentile such as 99.9"))
    try:
        return Estimator("percentile", percent)
    except SchemeError as error:
        scanner.fail(str(error), at=start)


def scan_repair(scanner: Scanner) -> tuple[str, Options]:
    """Read ``name(option=value, ...)``."""
    name = scanner.match(_NAME, "the name of a pass")
    options: list[tuple[str, OptionValue]] = []
    if scanner.accept("("):
        while True:
            start = scanner.position
            option = scanner.match(_NAME, "the name of an option")
            if option in dict(options):
                scanner.fail(f"option {option} is given twice", at=start)
            if not scanner.accept("="):
                scanner.fail('expected "="')
            options.append((option, _scan_value(scanner)))
            if scanner.accept(")"):
                break
            if not scanner.accept(","):
                scanner.fail('expected "," or ")"')
    return name, tuple(options)


def _scan_value(scanner: Scanner) -> OptionValue:
    start = scanner.position
    if scanner.peek(_NUMBER.pattern):
        text = scanner.match(_NUMBER, "a number")
        whole = text.lstrip("+-").isdigit()
        value = float(text)
        if math.isinf(value) or (whole and abs(int(text)) > _LARGEST):
            scanner.fail("the number is too large", at=start)
        return int(text) if whole else value
    word = scanner.match(_WORD, "a value: a number, true, false or a word")
    return {"true": True, "false": False}.get(word, word)


def check_repair(name: str, options: Options) -> None:
    """Raise SchemeError for a pass or an option's value that has no spelling."""
    names = [name, *(option for option, _ in options)]
    if not all(isinstance(each, str) and _NAME.fullmatch(each) for each in names):
        raise SchemeError(f"{names} are no names of a pass and its options: lower case, no spaces")
    for option, value in options:
        if names[1:].count(option) > 1:
            raise SchemeError(f"{name}: option {option} is given twice")
        if not has_spelling(value):
            raise SchemeError(
                f"{name}: {option} is {shown(value)}, which no scheme's text can say: a value is "
                "true, false, a word or a finite number, a whole one of at most 64 bits"
            )


def shown(value: object) -> str:
    """The value, cut short; Python prints no int of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def has_spelling(value: object) -> bool:
    """Whether a scheme's text can say an option's value."""
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None and value not in ("true", "false")
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and abs(value) <= _LARGEST


def spell_site(spec: SiteSpec) -> str:
    """The text of a SiteSpec, short where it can be: ``w8a8-static``, ``w4-g128/a8-dynamic``."""
    if spec.weight is None:
        return "fp"
    weight = spell_weight(spec.weight)
    if spec.activation is None:
        return weight
    short = weight[1:].isdigit() and isinstance(spec.activation.tensor.grid, IntegerGrid)
    return weight + ("" if short else "/") + spell_activation(spec.activation)


def spell_weight(spec: TensorSpec) -> str:
    grain = "-tensor" if spec.granularity == "tensor" else _spell_groups(spec)
    return f"w{_spell_element(spec.grid)}{grain}{'-asym' if spec.grid.has_zero_point else ''}"


def _spell_groups(spec: TensorSpec) -> str:
    if spec.granularity != "group":
        return ""
    return f"-g{spec.group_size}" + (f"-{spec.scale.name}" if spec.scale != FP32 else "")


def _spell_element(grid: Grid) -> str:
    return str(grid.bits) if isinstance(grid, IntegerGrid) else grid.name


def spell_activation(spec: ActivationSpec) -> str:
    grid = spec.tensor.grid
    text = f"a{_spell_element(grid)}-{'dynamic' if spec.dynamic else 'static'}"
    text += "-token" if spec.tensor.granularity == "token" else _spell_groups(spec.tensor)
    text += "-asym" if grid.has_zero_point else ""
    if spec.estimator is not None and spec.estimator != DEFAULT_ESTIMATOR:
        text += f":{spell_estimator(spec.estimator)}"
    return text


def spell_estimator(estimator: Estimator) -> str:
    """``absmax``, ``p99.9``, ``mse`` or ``entropy``."""
    if estimator.percent is None:
        return estimator.kind
    return "p" + repr(float(estimator.percent)).removesuffix(".0")


def spell_repair(name: str, options: Options) -> str:
    """``smooth(alpha=0.5)``."""
    values = ((key, str(v).lower() if isinstance(v, bool) else str(v)) for key, v in options)
    return name + (f"({','.join(f'{key}={value}' for key, value in values)})" if options else "")
