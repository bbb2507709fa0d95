"""A node's operands by name, as the operator's schema or the function's signature has them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import Node

# Functions and methods of torch that passes take apart: their parameters with the defaults.
_FUNCTIONS: dict[str, dict[str, Any]] = {
    "linear": {"input": None, "weight": None, "bias": None},
    "embedding": {"input": None, "weight": None},
    "matmul": {"input": None, "other": None},
    "layer_norm": {
        **{"input": None, "normalized_shape": None, "weight": None, "bias": None, "eps": 1e-5}
    },
    "rms_norm": {"input": None, "normalized_shape": None, "weight": None, "eps": None},
    "scaled_dot_product_attention": {
        **{"query": None, "key": None, "value": None, "attn_mask": None, "dropout_p": 0.0},
        **{"is_causal": False, "scale": None, "enable_gqa": False},
    },
}


def op_name(node: Node) -> str:
    """``relu`` for torch.relu, F.relu and x.relu(); empty for what is no call of an operator."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return ""


def operands(node: Node) -> Any:
    """The operands of a call as attributes: ``operands(node).weight_scale``.

    For the operators of ``torch.ops`` and the functions that this file lists; what a call leaves
    out has its default. TypeError for any other node.
    """
    names = _parameters(node)
    given = dict(zip(names, node.args, strict=False))
    return SimpleNamespace(**{**names, **given, **node.kwargs})


def _parameters(node: Node) -> dict[str, Any]:
    if isinstance(node.target, torch._ops.OpOverload):
        return {each.name: each.default_value for each in node.target._schema.arguments}
    if op_name(node) not in _FUNCTIONS:
        raise TypeError(f"{node.name}: the operands of {node.target} have no names here")
    return _FUNCTIONS[op_name(node)]
