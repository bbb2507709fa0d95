"""What a saved graph may call its nodes, modules, tensors and arguments.

Generated code holds no node's name (see ``OwnNames``), but paths of modules are written into it.
Whatever might mean something else there, or reach an attribute of Python or torch, is refused.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterable
from keyword import iskeyword
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen, PythonCode

from fxquant.errors import CheckpointError

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_COMPONENT = re.compile(r"[A-Za-z0-9_]+")
_DEPTH, _LENGTH = 32, 400
# What torch.fx puts into the namespace of generated code, and the argument that it reads from.
_OF_GENERATED_CODE = {"self", "torch", "inf", "nan", "NoneType", "device", "fx_pytree", "pytree"}
_EMPTY = GraphModule(nn.Module(), Graph())
_OF_MODULES = {*dir(nn.Module()), *vars(nn.Module())}
_OF_GRAPHS = {*dir(_EMPTY), *vars(_EMPTY)}


def check_name(name: object, where: str) -> str:
    """``name`` if a node may bear it; CheckpointError if not."""
    if not (isinstance(name, str) and _IDENTIFIER.fullmatch(name) and len(name) <= _LENGTH):
        raise CheckpointError(f"{where}: its name is not an identifier")
    if _reserved(name) or name in _OF_GENERATED_CODE or name.startswith("__"):
        raise CheckpointError(f"{where}: the name {name!r} has a meaning in Python or torch.fx")
    return name


def check_path(path: object, where: str) -> str:
    """``path`` if a module or tensor of a graph may stand there; CheckpointError if not.

    Components are words of ASCII; none may hold ``__``, be a reserved or built-in word, or be an
    attribute that modules (the first one: graphs) have anyway.
    """
    text = path if isinstance(path, str) else ""
    parts = text.split(".")
    if len(parts) > _DEPTH or len(text) > _LENGTH or not all(map(_COMPONENT.fullmatch, parts)):
        raise CheckpointError(f"{where}: {str(path)[:80]!r} is not a path of words and dots")
    for number, part in enumerate(parts):
        if "__" in part or _reserved(part) or part in (_OF_MODULES if number else _OF_GRAPHS):
            raise CheckpointError(
                f"{where}: {part!r} in the path {text!r} has a meaning in Python or torch"
            )
    return text


def check_texts(value: Any) -> None:
    """CheckpointError for text with control characters or halves of characters, keys included.

    It would reach terminals and files; neither belongs to a model's description.
    """
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            waiting += (*each.keys(), *each.values())
        elif isinstance(each, list):
            waiting += each
        elif isinstance(each, str) and _UNPRINTABLE.search(each):
            raise CheckpointError(f"{each[:60]!a} holds control characters or lone surrogates")


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _reserved(word: str) -> bool:
    return iskeyword(word) or word in vars(builtins)


class OwnNames(CodeGen):
    """Generated code whose variables are n0, n1, ... whatever the nodes are called."""

    def _gen_python_code(
        self, nodes: Any, root_module: str, namespace: Any, **options: Any
    ) -> PythonCode:
        listed: Iterable[Node] = nodes
        for number, node in enumerate(listed):
            namespace.associate_name_with_obj(f"n{number}", node)
        return super()._gen_python_code(nodes, root_module, namespace, **options)
