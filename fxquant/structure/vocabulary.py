"""What an operator does to the values that pass through it: one table for every question."""

from __future__ import annotations

import enum

from torch.fx import Node

from fxquant.ir.operands import op_name


class Kind(enum.Enum):
    """Kinds of operators, with the names that torch.fx, methods and functions spell them by."""

    CAST = ("to", "float", "half", "bfloat16", "double", "type_as", "type")
    SAME = ("contiguous", "clone", "detach", "dropout")  # every element stays where it is
    RESHAPE = ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze")
    PERMUTE = ("transpose", "permute", "movedim", "swapaxes")
    REPEAT = ("expand", "repeat", "repeat_interleave")
    PICK = ("getitem", "split", "chunk", "narrow", "select")
    SUM = ("add", "iadd", "add_")
    PRODUCT = ("mul", "multiply")
    DIFFERENCE = ("sub", "subtract")
    QUOTIENT = ("truediv", "div")
    POWER = ("pow",)
    ROOT = ("sqrt", "rsqrt")
    MEAN = ("mean",)
    NEGATION = ("neg",)
    RELU = ("relu", "relu_")
    SQUASH = ("tanh",)
    JOIN = ("cat",)
    LARGER = ("max", "maximum")
    MASK = ("where", "masked_fill", "hide")
    # The second is what decompose_attention writes: 0, not NaN, for a row that attends to nothing.
    SOFTMAX = ("softmax", "_safe_softmax.default")
    LINEAR = ("linear",)
    MATMUL = ("matmul", "bmm", "baddbmm", "mm", "einsum")
    ATTENTION = ("attention.default", "scaled_dot_product_attention")
    SHAPE = ("size", "dim", "ndim", "numel", "stride", "getattr", "new_zeros", "new_ones")


KINDS: dict[str, Kind] = {name: kind for kind in Kind for name in kind.value}
MOVES = (Kind.SAME, Kind.RESHAPE, Kind.PERMUTE, Kind.REPEAT, Kind.PICK)
# Products of two activations.
PRODUCTS = (Kind.MATMUL, Kind.ATTENTION)


def is_a(node: Node, *kinds: Kind) -> bool:
    """Whether ``node`` calls an operator of one of these kinds."""
    return KINDS.get(op_name(node)) in kinds
