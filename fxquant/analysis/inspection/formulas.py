"""How operands read: ``acc * scale * weight_scale`` rather than a list of arguments.

Every operand that is a tensor is named; what a reader sees elsewhere (the dtype of ``like``, a
device, a default) is left out. A call with other operands than the table expects is listed.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

_BINARY = {
    "add": "+",
    "iadd": "+",
    "sub": "-",
    "mul": "*",
    "matmul": "@",
    "truediv": "/",
    "floordiv": "//",
    "and_": "&",
    "or_": "|",
    "le": "<=",
    "lt": "<",
    "gt": ">",
    "ge": ">=",
    "eq": "==",
    "pow": "**",
}
_NAMES = {"scaled_dot_product_attention": "sdpa"}
_UNTOLD = ("device", "dtype")  # keywords; so are those that are None or False


def operator_name(target: str) -> str:
    """``fxquant.int_gemm`` is ``int_gemm`` in a listing."""
    name = target.removeprefix("fxquant.")
    for long, short in _NAMES.items():
        name = name.replace(long, short)
    return name


def formula(target: str, args: Sequence[str], kwargs: Sequence[tuple[str, str]]) -> str:
    """The operands of a call in words."""
    special = _FORMULAS.get(target)
    if special is not None and len(args) == special[0] and not kwargs:
        return special[1](args)
    if target in _BINARY and len(args) == 2 and not kwargs:
        return f"{args[0]} {_BINARY[target]} {args[1]}"
    if target == "getitem" and len(args) == 2:
        return f"{args[0]}[{_index(args[1])}]"
    named = [
        f"{key}={value}"
        for key, value in kwargs
        if value not in ("None", "False") and key not in _UNTOLD
    ]
    return ", ".join((*args, *named))


def _index(text: str) -> str:
    return text[1:-1] if text.startswith("(") else text


def _choose_qparams(a: Sequence[str]) -> str:
    x, granularity, symmetric, qmin, qmax = a
    ends = "max|x|" if ast.literal_eval(symmetric) else "min, max"
    each = "each token" if ast.literal_eval(granularity) == "token" else "the tensor"
    return f"{ends} of {x}, {each}, {_range(qmin, qmax)}"


def _choose_scale(a: Sequence[str]) -> str:
    x, granularity, grid = a
    each = "each token" if granularity == "'token'" else "the tensor"
    return f"max|x| of {x}, {each}, to the ends of {_bare(grid)}"


def _bare(name: str) -> str:
    """A format's name without the quotes that a text has."""
    return name.strip(chr(39))


def _choose_group_scales(a: Sequence[str]) -> str:
    x, shared, grid, scale, size = a
    under = "" if shared == "None" else f" under {shared}"
    return (
        f"max|x| of {size} columns of {x}, to the ends of {_bare(grid)}, in {_bare(scale)}{under}"
    )


def _quantize_to(a: Sequence[str]) -> str:
    groups = "" if a[3] == "0" else f", {a[3]} columns a scale"
    return f"{a[0]} / {a[1]}, nearest of {_bare(a[2])}{groups}"


def _decode_scales(a: Sequence[str]) -> str:
    return f"{a[0]}, the scale of each {_bare(a[2])} code" + (
        "" if a[1] == "None" else f" * {a[1]}"
    )


def _code_gemm(a: Sequence[str]) -> str:
    x, w = (
        number if shift == "None" else f"({number} - {shift})"
        for number, shift in ((a[0], a[2]), (a[1], a[3]))
    )
    return f"{x} @ {w}.T, {_bare(a[4])} by {_bare(a[5])}"


def _grouped_code_gemm(a: Sequence[str]) -> str:
    x, weight, x_scale, weight_scale, *shifts, x_grid, weight_grid, x_group, weight_group = a
    product = _code_gemm((x, weight, *shifts, x_grid, weight_grid))
    scales = "".join(
        f" * {scale} ({size} columns)"
        for scale, size in ((x_scale, x_group), (weight_scale, weight_group))
        if scale != "None"
    )
    return f"{product}{scales}"


def _quantize(a: Sequence[str]) -> str:
    x, scale, zero_point, qmin, qmax, _ = a
    shift = "" if zero_point == "None" else f" + {zero_point}"
    return f"{x} / {scale}{shift}, {_range(qmin, qmax)}"


def _range(qmin: str, qmax: str) -> str:
    return f"±{qmax}" if qmin == f"-{qmax}" else f"{qmin}..{qmax}"


def _dequantize(a: Sequence[str]) -> str:
    codes, scale, zero_point, group_size, _ = a
    shifted = codes if zero_point == "None" else f"({codes} - {zero_point})"
    groups = "" if group_size == "0" else f", {group_size} columns a scale"
    return f"{shifted} * {scale}{groups}"


def _int_gemm(a: Sequence[str]) -> str:
    return f"{a[0]} @ {a[1]}.T" + ("" if a[2] == "0" else f", {a[2]} columns at a time")


def _minus(sums: str, pairs: Sequence[tuple[str, str]]) -> str:
    terms = "".join(f" - {x} * {y}" for x, y in pairs if "None" not in (x, y))
    return f"({sums}{terms})" if terms else sums


def _grouped_gemm(a: Sequence[str]) -> str:
    x, weight, weight_scale, zero_point, weight_sum, weight_zero_point, group_size = a
    w = weight if weight_zero_point == "None" else f"({weight} - {weight_zero_point})"
    product = _minus(f"{x} @ {w}.T", [(zero_point, weight_sum)])
    return f"{product} * {weight_scale}, {group_size} columns a scale"


def _rescale(a: Sequence[str]) -> str:
    sums, scale, weight_scale, zero_point, weight_sum, weight_zero_point, x_sum, _ = a
    corrected = _minus(sums, [(zero_point, weight_sum), (weight_zero_point, x_sum)])
    return " * ".join(part for part in (corrected, scale, weight_scale) if part != "None")


def _attention(a: Sequence[str]) -> str:
    mask = "causal" if a[3] == "None" else f"mask={a[3]}"
    return ", ".join((*a[:3], mask, *(() if a[4] == "None" else (f"scale={a[4]}",))))


def _int_linear(a: Sequence[str]) -> str:
    codes, weight, scale, weight_scale, zero_point, weight_sum, weight_zero_point, bias = a[:8]
    pairs = [(zero_point, weight_sum), (weight_zero_point, f"sum({codes})")]
    product = f"{_minus(f'{codes} @ {weight}.T', pairs)} * {scale} * {weight_scale}"
    return product + _plus(bias)


def _grouped_int_linear(a: Sequence[str]) -> str:
    codes, weight, scale, weight_scale, zero_point, weight_sum, shift, bias, _, group_size, _ = a
    grouped = (codes, weight, weight_scale, zero_point, weight_sum, shift, group_size)
    product, _, columns = _grouped_gemm(grouped).rpartition(", ")
    return f"{product} * {scale}{_plus(bias)}, {columns}"


def _dequant_linear(a: Sequence[str]) -> str:
    x, weight, scale, zero_point, bias, group_size, _ = a
    number, *groups = _dequantize((weight, scale, zero_point, group_size, x)).split(", ")
    return ", ".join((f"{x} @ ({number}).T{_plus(bias)}", *groups))


def _code_linear(a: Sequence[str]) -> str:
    codes, weight, scale, weight_scale, bias, _, x_grid, weight_grid = a
    grids = f"{_bare(x_grid)} by {_bare(weight_grid)}"
    return f"{codes} @ {weight}.T * {scale} * {weight_scale}{_plus(bias)}, {grids}"


def _plus(bias: str) -> str:
    return "" if bias == "None" else f" + {bias}"


_FORMULAS: dict[str, tuple[int, Callable[[Sequence[str]], str]]] = {
    "fxquant.choose_qparams": (5, _choose_qparams),
    "fxquant.quantize": (6, _quantize),
    "fxquant.choose_scale": (3, _choose_scale),
    "fxquant.choose_global_scale": (3, lambda a: f"max|x| of {a[0]}, to the ends of both formats"),
    "fxquant.choose_group_scales": (5, _choose_group_scales),
    "fxquant.decode_scales": (3, _decode_scales),
    "fxquant.quantize_to": (4, _quantize_to),
    "fxquant.decode": (3, lambda a: f"{a[0]}, the number of each {_bare(a[1])} code"),
    "fxquant.code_gemm": (6, _code_gemm),
    "fxquant.grouped_code_gemm": (10, _grouped_code_gemm),
    "fxquant.dequantize": (5, _dequantize),
    "fxquant.unpack_int4": (2, lambda a: f"{a[0]}, two codes a byte"),
    "fxquant.code_sum": (1, lambda a: f"sum of {a[0]} over columns"),
    "fxquant.int_gemm": (3, _int_gemm),
    "fxquant.int_matmul": (2, lambda a: f"{a[0]} @ {a[1]}"),
    "fxquant.column_scales": (2, lambda a: f"{a[0]}, NaN in columns where {a[1]} is"),
    "fxquant.attention": (5, _attention),
    "fxquant.code_matmul": (4, lambda a: f"{a[0]} @ {a[1]}, {_bare(a[2])} by {_bare(a[3])}"),
    "fxquant.store_kv_to": (2, lambda a: f"{a[0]}, nearest of {_bare(a[1])}, each token and head"),
    "fxquant.store_kv": (2, lambda a: f"{a[0]}, {a[1]} bits, each token and head"),
    "hide": (2, lambda a: f"{a[0]} where {a[1]}, else -inf"),
    "fxquant.grouped_gemm": (7, _grouped_gemm),
    "fxquant.rescale": (8, _rescale),
    "fxquant.add_bias": (3, lambda a: f"{a[0]} + {a[1]}"),
    "fxquant.quantize_rows": (5, _choose_qparams),
    "fxquant.quantize_static": (5, lambda a: _quantize((*a, ""))),
    "fxquant.int_linear": (11, _int_linear),
    "fxquant.code_linear": (8, _code_linear),
    "fxquant.grouped_int_linear": (11, _grouped_int_linear),
    "fxquant.int_product": (5, lambda a: f"{a[0]} @ {a[1]} * {a[2]} * {a[3]}"),
    "fxquant.dequant_linear": (7, _dequant_linear),
    "linear": (3, lambda a: f"{a[0]} @ {a[1]}.T{_plus(a[2])}"),
}
