"""The nodes of a graph as JSON and back, with an explicit table of everything they may call.

Nothing in a file is executed: a target, an argument's name or a text that is not in the tables is
an error both ways. Names and paths have the rules of ``saved_names``; what the nodes compute is
tried by ``rehearsal`` before any code is generated.
"""

from __future__ import annotations

import importlib
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.nn import functional

from fxquant.checkpoint.dataclass_json import from_json, to_json
from fxquant.checkpoint.saved_names import OwnNames, check_name, check_path
from fxquant.errors import CheckpointError
from fxquant.files.tensor_file import DTYPES, dtype_name
from fxquant.formats.table import GRIDS, SCALES
from fxquant.ir.functions import attended_keys, causal_mask, default_mask, hide, shared_heads
from fxquant.ir.graph import Tag, set_tag, tag
from fxquant.ir.grid_operators import COMPOSITE
from fxquant.ir.legal_forms import LEGAL

_OPERATOR = """abs add and_ eq floordiv ge getitem gt iadd invert le lshift lt matmul mod mul ne neg
not_ or_ pow rshift setitem sub truediv xor"""
_TORCH = """abs add all any arange argmax bitwise_and bmm baddbmm broadcast_to cat ceil chunk
clamp clone conv1d cos cumsum div einsum empty empty_like eq erf exp finfo flatten floor full
full_like gather ge gt index_select isfinite le log logical_and logical_not logical_or lt
masked_fill matmul max maximum mean min minimum mm mul narrow ne neg ones ones_like outer permute
pow reciprocal relu repeat_interleave reshape round rsqrt select sigmoid sin softmax split sqrt
square squeeze stack sub sum swapaxes tanh tensor topk transpose tril triu unbind unflatten
unsqueeze where zeros zeros_like"""
_FUNCTIONAL = """embedding gelu hardswish layer_norm leaky_relu linear log_softmax mish normalize
pad relu relu6 rms_norm scaled_dot_product_attention sigmoid silu softmax softplus tanh"""
_METHODS = """abs add all amax amin any argmax baddbmm bfloat16 bmm bool ceil chunk clamp clone
contiguous cos cumsum detach dim div double eq exp expand expand_as flatten float floor gather ge
gt half index_select int le log long lt masked_fill matmul max maximum mean min minimum mm mul
narrow ne neg new_empty new_full new_ones new_tensor new_zeros permute pow reciprocal relu repeat
repeat_interleave reshape round rsqrt scatter select sigmoid sin size softmax split sqrt square
squeeze stride sub sum swapaxes t tanh to transpose tril triu type_as unbind unflatten unsqueeze
view view_as where"""
# getattr reads these of tensors and of finfo, nothing else.
_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "T", "mT", "min", "max", "eps", "tiny")
_KEYWORDS = """_stacklevel alpha approximate attn_mask axis batch1 batch2 beta bias chunks
condition correction descending device diagonal dilation dim dim0 dim1 dims dropout_p dtype
enable_gqa end end_dim eps equation exponent fill_value groups half_to_float index indices
inplace input is_causal k keepdim largest length mask mat2 max max_norm min mode negative_slope
norm_type normalized_shape other output_size p pad padding padding_idx query key repeats
rounding_mode scale scale_grad_by_freq sections shape size sizes sorted source sparse split_size
split_size_or_sections start start_dim step tensor tensor1 tensor2 tensors threshold unbiased
upper value weight"""
# Texts that may stand among a target's arguments, none elsewhere.
_TEXTS: dict[str, tuple[str, ...]] = {
    "getattr": _ATTRIBUTES,
    "functional.gelu": ("none", "tanh"),
    "functional.pad": ("constant",),
    "torch.div": ("floor", "trunc"),
    "div": ("floor", "trunc"),
    "fxquant.choose_qparams.default": ("tensor", "token"),
    "fxquant.choose_scale.default": ("tensor", "token"),
}
# What names grids and formats of scales among its arguments.
_NAME_A_FORMAT = {f"fxquant.{schema.split('(')[0]}.default" for schema in COMPOSITE}
_EQUATION = re.compile(r"[A-Za-z ]+,?[A-Za-z ]*->[A-Za-z ]*")  # at most two operands of einsum
_LONGEST_EQUATION = 200
_LARGEST, _NESTING, _NODES = 2**63, 6, 100_000
# Memory of the process, which no graph may show: what is written into them starts at 0.
_UNSET = {
    ("call_function", "torch.empty"): "torch.zeros",
    ("call_function", "torch.empty_like"): "torch.zeros_like",
    ("call_method", "new_empty"): "new_zeros",
}
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
    **{
        f"attention.{form.__name__}": form
        for form in (attended_keys, causal_mask, hide, shared_heads)
    },
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_METHOD_NAMES = frozenset(_METHODS.split())
_KEYWORD_NAMES = frozenset(_KEYWORDS.split())
_DTYPES = {dtype_name(dtype): dtype for dtype in DTYPES.values()}
_OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")
_INPUTS = ("input_ids", "attention_mask")


def encode_node(node: Node) -> list[Any]:
    """``[op, name, target, args, kwargs, tag]``; CheckpointError names node and target."""
    where = f"node {node.name}"
    target = _target_name(node)
    _check_node(node.op, node.name, target, where)
    _check_arguments(node.op, target, node.args, node.kwargs, where)
    kwargs = {key: _encode(value, where) for key, value in node.kwargs.items()}
    args = [_encode(value, where) for value in node.args]
    return [node.op, node.name, target, args, kwargs, to_json(tag(node))]


def decode_nodes(data: object) -> Graph:
    """The graph of encoded nodes; CheckpointError for whatever the tables do not list."""
    graph = Graph()
    graph.set_codegen(OwnNames())
    nodes: dict[str, Node] = {}
    if not isinstance(data, list):
        raise CheckpointError("the nodes are not a list")
    if len(data) > _NODES:
        raise CheckpointError(f"{len(data)} nodes, no model has more than {_NODES}")
    for number, encoded in enumerate(data):
        if not (isinstance(encoded, list) and len(encoded) == 6):
            raise CheckpointError(f"node {number} is not [op, name, target, args, kwargs, tag]")
        op, name, target, args, kwargs, provenance = encoded
        where = f"node {str(name)[:80]!r}"
        if not (isinstance(args, list) and isinstance(kwargs, dict) and isinstance(target, str)):
            raise CheckpointError(f"{where}: its target and arguments are of other types")
        _check_node(op, name, target, where)
        target = _UNSET.get((op, target), target)
        decoded = tuple(_decode(value, nodes, where) for value in args)
        options = {key: _decode(value, nodes, where) for key, value in kwargs.items()}
        _check_arguments(op, target, decoded, options, where)
        function = _function(target) if op == "call_function" else target
        node = graph.create_node(op, function, decoded, options, name)
        if node.name != name:
            raise CheckpointError(f"{where}: the name is taken or not one that torch.fx gives")
        set_tag(node, from_json(Tag, provenance))
        nodes[name] = node
    _check_ends(graph)
    return graph


def _check_ends(graph: Graph) -> None:
    """Two inputs first, one output last: what makes the first and last line of generated code."""
    nodes = list(graph.nodes)
    kinds = [node.op for node in nodes]
    inner = {"placeholder", "output"} & set(kinds[2:-1])
    if kinds[:2] != ["placeholder"] * 2 or kinds[-1] != "output" or inner:
        raise CheckpointError("the nodes are not two inputs first and one output last")
    if tuple(node.target for node in nodes[:2]) != _INPUTS:
        raise CheckpointError(f"the inputs are not {' and '.join(_INPUTS)}")


def _target_name(node: Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    known = _NAMES.get(node.target)  # type: ignore[arg-type]
    if known is not None:
        return known
    module = getattr(node.target, "__module__", "")
    return f"{module}.{getattr(node.target, '__qualname__', node.target)}"


def _function(name: str) -> Callable[..., Any]:
    if name in _OF_MODELS:
        module, _, function = name.rpartition(".")
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found
    return _FUNCTIONS[name]


def _check_node(op: object, name: object, target: str, where: str) -> None:
    if op not in _OPS:
        raise CheckpointError(f"{where}: unknown kind of node {str(op)[:80]!r}")
    known = {
        "call_function": target in _FUNCTIONS or target in _OF_MODELS,
        "call_method": target in _METHOD_NAMES,
        "placeholder": target in _INPUTS,
        "output": target == "output",
    }
    if not known.get(str(op), True):
        raise CheckpointError(
            f"{where}: target {target[:80]!r} of a {op} is not among those that a saved graph may "
            "contain (fxquant/checkpoint/graph_json.py lists them)"
        )
    if op in ("call_module", "get_attr"):
        check_path(target, where)
    check_name(name, where)


def _check_arguments(
    op: str, target: str, args: tuple[Any, ...], kwargs: dict[str, Any], where: str
) -> None:
    """CheckpointError for operands that this kind of node does not take."""
    strangers = [key for key in kwargs if key not in _KEYWORD_NAMES]
    if strangers:
        raise CheckpointError(f"{where}: no operation has an argument {strangers[0][:80]!r}")
    if op == "placeholder" and not (args in ((), (None,)) and not kwargs):
        raise CheckpointError(f"{where}: an input's default is None")
    if op in ("get_attr", "output") and (len(args) != (op == "output") or kwargs):
        raise CheckpointError(f"{where}: a {op} has other operands")
    first_is_node = bool(args) and isinstance(args[0], Node)
    if op in ("output", "call_method", "call_module") and not first_is_node:
        raise CheckpointError(f"{where}: the first operand of a {op} is not a node")
    if op == "call_function" and target == "getattr":
        attribute = args[1] if len(args) == 2 and first_is_node and not kwargs else None
        if not (isinstance(attribute, str) and attribute in _ATTRIBUTES):
            raise CheckpointError(
                f"{where}: getattr of {str(args[1:])[:80]}, may be {', '.join(_ATTRIBUTES)}"
            )
    dropped = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0)
    if target == "functional.scaled_dot_product_attention" and dropped != 0:
        raise CheckpointError(f"{where}: attention that drops scores at random")
    for value in (*args, *kwargs.values()):
        _check_literal(op, target, value, where)


def _check_literal(op: str, target: str, value: Any, where: str) -> None:
    if isinstance(value, list | tuple):
        for item in value:
            _check_literal(op, target, item, where)
    elif isinstance(value, slice):
        _check_literal(op, target, [value.start, value.stop, value.step], where)
    elif isinstance(value, str):
        plain = op in ("call_function", "call_method") and value in _TEXTS.get(target, ())
        known = value in GRIDS or value in SCALES
        plain = plain or (op == "call_function" and target in _NAME_A_FORMAT and known)
        if not plain and not (target == "torch.einsum" and _is_equation(value)):
            raise CheckpointError(f"{where}: {target} does not take the text {value[:80]!r}")
    elif type(value) is int and not -_LARGEST <= value < _LARGEST:
        raise CheckpointError(f"{where}: an integer of more than 64 bits")
    elif type(value) is float and math.isnan(value):
        raise CheckpointError(f"{where}: an operand is NaN")


def _is_equation(text: str) -> bool:
    # Matching takes the square of the length.
    return len(text) <= _LONGEST_EQUATION and _EQUATION.fullmatch(text) is not None


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
        return {"dtype": dtype_name(value)}
    raise CheckpointError(f"{where}: an argument of type {type(value).__name__} cannot be saved")


def _decode(value: Any, nodes: dict[str, Node], where: str, depth: int = 0) -> Any:
    if depth > _NESTING:
        raise CheckpointError(f"{where}: its arguments are nested more than {_NESTING} deep")
    if isinstance(value, list):
        return [_decode(item, nodes, where, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items())) if len(value) == 1 else (None, None)
    if kind == "node" and isinstance(content, str) and content in nodes:
        return nodes[content]
    if kind == "tuple" and isinstance(content, list):
        return tuple(_decode(item, nodes, where, depth + 1) for item in content)
    if kind == "slice" and isinstance(content, list) and len(content) == 3:
        return slice(*(_decode(end, nodes, where, depth + 1) for end in content))
    if kind == "ellipsis" and content is True:
        return Ellipsis
    if kind == "dtype" and isinstance(content, str) and content in _DTYPES:
        return _DTYPES[content]
    raise CheckpointError(f"{where}: argument {str(value)[:80]} is not understood")
