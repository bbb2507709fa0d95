"""The nodes of a graph as JSON and back, with an explicit table of everything they may call.

Nothing in a file is executed: a target that is not in the table is an error both ways, and names
and paths, which torch.fx writes into generated code, must be plain identifiers.
"""

from __future__ import annotations

import importlib
import operator
import re
from collections.abc import Callable
from keyword import iskeyword
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.nn import functional

from fxquant.dataclass_json import from_json, to_json
from fxquant.errors import CheckpointError
from fxquant.graph import Tag, set_tag, tag
from fxquant.levels import LEGAL
from fxquant.passes.decompose_attention import causal_mask, hide, shared_heads
from fxquant.tracing import default_mask

_OPERATOR = """abs add and_ eq floordiv ge getitem gt iadd invert le lshift lt matmul mod mul ne neg
not_ or_ pow rshift setitem sub truediv xor"""
_TORCH = """abs add all any arange argmax bitwise_and bmm baddbmm cat ceil chunk clamp clone cos
cumsum div einsum empty empty_like eq erf exp finfo flatten floor full full_like gather ge gt
index_select isfinite le log logical_and logical_not logical_or lt masked_fill matmul max maximum
mean min minimum mm mul narrow ne neg ones ones_like outer permute pow reciprocal relu
repeat_interleave reshape round rsqrt select sigmoid sin softmax split sqrt square squeeze stack sub
sum swapaxes tanh tensor transpose tril triu unbind unflatten unsqueeze where zeros zeros_like"""
_FUNCTIONAL = """embedding gelu hardswish layer_norm leaky_relu linear log_softmax mish normalize
pad relu relu6 rms_norm scaled_dot_product_attention sigmoid silu softmax softplus tanh"""
_METHODS = """abs add all amax amin any argmax baddbmm bfloat16 bmm bool ceil chunk clamp clone
contiguous cos cumsum detach dim div double eq exp expand expand_as flatten float floor gather
ge gt half index_select int le log long lt masked_fill matmul max maximum mean min minimum mm mul
narrow ne neg new_empty new_full new_ones new_tensor new_zeros permute pow reciprocal relu repeat
repeat_interleave reshape round rsqrt select sigmoid sin size softmax split sqrt square squeeze
stride sub sum swapaxes t tanh to transpose tril triu type_as unbind unflatten unsqueeze view
view_as where"""
# getattr reads these of tensors and of finfo, nothing else.
_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "T", "mT", "min", "max", "eps", "tiny")
# Functions of models that the tracer keeps whole: imported only where a graph calls them.
_OF_MODELS = ("transformers.models.gptj.modeling_gptj.get_embed_positions",)

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATOR.split()},
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH.split()},
    **{f"functional.{name}": getattr(functional, name) for name in _FUNCTIONAL.split()},
    **{str(form.target): form.target for form in LEGAL if not isinstance(form.target, type)},
    "aten._safe_softmax.default": torch.ops.aten._safe_softmax.default,
    "getattr": getattr,
    "default_mask": default_mask,
    **{f"attention.{form.__name__}": form for form in (causal_mask, hide, shared_heads)},
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_METHOD_NAMES = frozenset(_METHODS.split())
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
}
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")
_INPUTS = ("input_ids", "attention_mask")


def encode_node(node: Node) -> list[Any]:
    """``[op, name, target, args, kwargs, tag]``; CheckpointError names node and target."""
    where = f"node {node.name}"
    target = _target_name(node)
    kwargs = {key: _encode(value, where) for key, value in node.kwargs.items()}
    _check_node(node.op, node.name, target, node.args, where)
    args = [_encode(value, where) for value in node.args]
    return [node.op, node.name, target, args, kwargs, to_json(tag(node))]


def decode_nodes(data: list[Any]) -> Graph:
    """The graph of encoded nodes; CheckpointError for whatever the tables do not list."""
    graph = Graph()
    nodes: dict[str, Node] = {}
    for op, name, target, args, kwargs, provenance in data:
        where = f"node {name!r}"
        if op not in _OPS:
            raise CheckpointError(f"{where}: unknown kind of node {op!r}")
        decoded = tuple(_decode(value, nodes, where) for value in args)
        options = {key: _decode(value, nodes, where) for key, value in kwargs.items()}
        _check_node(op, name, target, decoded, where)
        if not all(_IDENTIFIER.fullmatch(key) and not iskeyword(key) for key in options):
            raise CheckpointError(f"{where}: argument names are not identifiers")
        function = _function(target, where) if op == "call_function" else target
        node = graph.create_node(op, function, decoded, options, name)
        if node.name != name:
            raise CheckpointError(f"{where}: the name is taken or not one that torch.fx gives")
        set_tag(node, from_json(Tag, provenance))
        nodes[name] = node
    return graph


def _target_name(node: Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    known = _NAMES.get(node.target)  # type: ignore[arg-type]
    if known is not None:
        return known
    module = getattr(node.target, "__module__", "")
    return f"{module}.{getattr(node.target, '__qualname__', node.target)}"


def _function(name: str, where: str) -> Callable[..., Any]:
    if name in _OF_MODELS:
        module, _, function = name.rpartition(".")
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found
    return _FUNCTIONS[name]


def _check_node(op: str, name: str, target: str, args: tuple[Any, ...], where: str) -> None:
    known = True
    if op == "call_function":
        known = target in _FUNCTIONS or target in _OF_MODELS
    elif op == "call_method":
        known = target in _METHOD_NAMES
    elif op == "placeholder":
        known = target in _INPUTS
    elif op in ("call_module", "get_attr"):
        known = bool(_PATH.fullmatch(target))
    if not known:
        raise CheckpointError(
            f"{where}: target {target!r} of a {op} is not among those that a saved graph may "
            "contain (fxquant/graph_json.py lists them)"
        )
    if not _IDENTIFIER.fullmatch(name):
        raise CheckpointError(f"{where}: its name is not an identifier")
    if target == "getattr" and op == "call_function" and args[1:] and args[1] not in _ATTRIBUTES:
        raise CheckpointError(f"{where}: getattr of {args[1]!r}, may be {', '.join(_ATTRIBUTES)}")


def _encode(value: Any, where: str) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [_encode(item, where) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, where) for item in value]}
    if isinstance(value, slice):
        return {"slice": [_encode(end, where) for end in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.dtype) and value in _DTYPES.values():
        return {"dtype": str(value).removeprefix("torch.")}
    raise CheckpointError(f"{where}: an argument of type {type(value).__name__} cannot be saved")


def _decode(value: Any, nodes: dict[str, Node], where: str) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes, where) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node" and content in nodes:
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode(item, nodes, where) for item in content)
    if kind == "slice":
        return slice(*(_decode(end, nodes, where) for end in content))
    if kind == "ellipsis":
        return Ellipsis
    if kind == "dtype" and content in _DTYPES:
        return _DTYPES[content]
    raise CheckpointError(f"{where}: argument {kind} {content!r} is not understood")
