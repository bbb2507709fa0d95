"""What a process does while a checkpoint is loaded and run, as Python's audit events tell."""

from __future__ import annotations

import ast
import contextlib
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from fxquant.checkpoint import graph_json

_FORBIDDEN = (
    "subprocess.",
    "os.",
    "socket.",
    "shutil.",
    "ctypes.",
    "pty.",
    "webbrowser.",
    "urllib",
)
_HARMLESS = {"os.listdir", "os.scandir"}
_state: dict[str, Any] = {"folder": None, "seen": None}


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what no loading of a graph needs: processes, sockets, files elsewhere, foreign code."""
    if _state["seen"] is None:
        return
    if event == "open":
        path = str(arguments[0])
        source = path.endswith((".py", ".pyc")) and path.startswith(tuple(p for p in sys.path if p))
        library = path.startswith((sys.prefix, sys.base_prefix))  # lazy imports, tracebacks
        writes = isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes or not (path.startswith(str(_state["folder"])) or source or library):
            _state["seen"].append((event, path))
    elif event == "compile":
        name = str(arguments[1])
        if not (name.startswith("<eval_with_key>") or name.startswith("<")):
            _state["seen"].append((event, name))
    elif event.startswith(_FORBIDDEN) and event not in _HARMLESS:
        _state["seen"].append((event, str(arguments)[:100]))


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched(folder: Path, seconds: int = 30) -> Iterator[list[tuple[str, str]]]:
    """Yields the list of forbidden events; TimeoutError after ``seconds``."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    seen: list[tuple[str, str]] = []
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    _state.update(folder=folder, seen=seen)
    try:
        yield seen
    finally:
        _state.update(folder=None, seen=None)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def foreign_reads(gm: GraphModule) -> list[str]:
    """What the generated code names beyond its own variables, tensors, leaves and the tables."""
    reachable = {name for name, _ in gm.named_modules(remove_duplicate=False)}
    reachable |= {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    reachable |= {name for name, _ in gm.named_buffers(remove_duplicate=False)}
    methods = {*graph_json._METHOD_NAMES, *graph_json._ATTRIBUTES}
    functions = set(graph_json._FUNCTIONS.values())
    names = type(gm).forward.__globals__
    found: list[str] = []

    def path_of(node: ast.expr) -> str | None:
        """``a.b.c`` of attribute reads, written with dots or as getattr(..., "0")."""
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Attribute):
            owner = path_of(node.value)
            return None if owner is None else f"{owner}.{node.attr}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            owner, name = path_of(node.args[0]), node.args[1]
            if owner is not None and isinstance(name, ast.Constant) and len(node.args) == 2:
                return f"{owner}.{name.value!s}"
        return None

    def visit(node: ast.AST) -> None:
        path = path_of(node) if isinstance(node, ast.expr) else None
        if path is None:
            for child in ast.iter_child_nodes(node):
                visit(child)
            return
        root, _, rest = path.partition(".")
        if root == "self":
            known = rest in reachable
        elif re.fullmatch(r"n\d+", root):
            known = not rest or rest in methods
        elif root == "torch":
            value = names["torch"]
            for part in rest.split(".") if rest else []:
                value = getattr(value, part)
            known = not rest or value in functions or rest in graph_json._DTYPES
        else:
            fixed = {"input_ids", "attention_mask", "slice", "inf", "getattr", "Ellipsis"}
            known = not rest and (root in fixed or names.get(root) in functions)
            known = known or (not rest and root.endswith("get_embed_positions"))
        if not known:
            found.append(path)

    (function,) = ast.parse(gm.code.strip()).body
    assert isinstance(function, ast.FunctionDef)
    for statement in function.body:
        visit(statement)
    return found
