"""Seeded structured changes of a saved graph, signed again as an attacker would."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxquant.checkpoint import graph_json
from fxquant.checkpoint.manifest import MANIFEST, write_manifest

Data = dict[str, Any]
HUGE = "@HUGE@"  # stands for an integer of more digits than Python converts
NAMES = (
    *("self", "torch", "inf", "nan", "NoneType", "device", "fx_pytree", "pytree", "print", "eval"),
    *("exec", "getattr", "__builtins__", "__class__", "input_ids", "attention_mask", "forward"),
    *("_modules", "training", "n3", "n0", "class", "lambda", "x.y", "a-b", "0", "_"),
)
PATHS = (
    *("split.__globals__.get", "self", "forward", "_modules", "__dict__", "register_buffer"),
    *("model.__class__", "lm_head.forward.__globals__", "a;import os", "..", "", "print", "torch"),
    *("graph", "code", "training", "lm_head.weight.data", "model..x", "a" * 5000),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**63), 10**400, HUGE, 0.5, 1e308, -1e308),
    *(float("inf"), float("-inf"), float("nan"), "", "self", "__class__", "\ud800", "\x1b[31m"),
    *("a" * 3000, [], {}, [1], {"node": "self"}, {"tuple": []}, {"tuple": [{"tuple": []}]}),
    *({"slice": [0, 10**9, 1]}, {"dtype": "float64"}, {"dtype": "object"}, {"ellipsis": True}),
    *({"node": "input_ids"}, {"device": "cuda"}, "cuda", "cpu", "min", "tensor", "w8", "observed"),
)
INSERTED: tuple[tuple[str, str, list[Any]], ...] = (
    ("call_function", "operator.pow", [10, 10**8]),
    ("call_function", "operator.lshift", [1, 10**12]),
    ("call_function", "operator.mul", [[0], 10**9]),
    ("call_function", "operator.mul", ["a", 10**9]),
    ("call_function", "operator.getitem", ["abc", 0]),
    ("call_function", "operator.getitem", [{"node": "input_ids"}, {"slice": [0, HUGE, 1]}]),
    ("call_function", "operator.add", ["a", "b"]),
    ("call_function", "torch.zeros", [10**12]),
    ("call_function", "torch.ones", [[10**6, 10**6]]),
    ("call_function", "torch.arange", [10**11]),
    ("call_function", "torch.full", [[2**40], 0.0]),
    ("call_function", "torch.einsum", ["i,j,k,l->", {"node": "input_ids"}]),
    ("call_function", "getattr", [{"node": "input_ids"}, "__class__"]),
    ("call_function", "getattr", [{"node": "input_ids"}, "data"]),
    ("call_function", "getattr", [{"node": "input_ids"}, "max"]),
    ("call_function", "getattr", ["abc", "shape"]),
    ("call_function", "operator.setitem", [{"node": "input_ids"}, 0, 1]),
    ("call_function", "operator.iadd", [{"node": "attention_mask"}, 1]),
    ("call_function", "builtins.eval", ["open('/tmp/x', 'w')"]),
    ("call_function", "os.system", ["true"]),
    ("call_method", "new_zeros", [{"node": "input_ids"}, 10**12]),
    ("call_method", "new_zeros", [{"node": "input_ids"}, {"tuple": [10**6, 10**7]}]),
    ("call_method", "repeat", [{"node": "input_ids"}, 10**6, 10**6]),
    ("call_method", "expand", [{"node": "input_ids"}, 2**40, -1, -1]),
    ("call_method", "to", [{"node": "input_ids"}, "cuda"]),
    ("call_method", "split", ["a,b", ","]),
    ("call_method", "float", ["1"]),
    ("call_method", "__reduce__", [{"node": "input_ids"}]),
    ("call_method", "share_memory_", [{"node": "input_ids"}]),
    ("get_attr", "split.__globals__.get", []),
    ("get_attr", "lm_head.weight.data", []),
    ("call_module", "lm_head", ["x"]),
    ("placeholder", "input_ids", []),
    ("output", "output", [{"node": "input_ids"}]),
)


def write(folder: Path, data: Data | str) -> None:
    """graph.json with checksums that fit again."""
    text = data if isinstance(data, str) else json.dumps(data)
    (folder / "graph.json").write_text(text.replace(f'"{HUGE}"', "1" + "0" * 6000))
    sign(folder)


def sign(folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
    write_manifest(folder)


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) below ``value``."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(pairs):
        found.append((value, key))
        if isinstance(item, dict | list):
            _places(item, found)
    return found


def _some_place(rng: random.Random, data: Data) -> tuple[Any, Any]:
    part = rng.choice(["nodes", "nodes", "modules", "info", "ties", "orders"])
    within = data[part]
    if part == "nodes":
        within = rng.choice(data["nodes"])
    elif part == "modules" and rng.random() < 0.8:
        within = data["modules"][rng.choice(list(data["modules"]))]
    elif part == "info" and rng.random() < 0.5:
        within = {key: value for key, value in data["info"].items() if key != "history"}
        key = rng.choice(list(within))
        if not isinstance(within[key], dict | list):
            return data["info"], key
        within = within[key]
    return rng.choice(_places(within, []) or [(data, part)])


def replace_value(rng: random.Random, data: Data) -> None:
    container, key = _some_place(rng, data)
    container[key] = copy.deepcopy(rng.choice(VALUES))


def nudge_number(rng: random.Random, data: Data) -> None:
    numbers = [
        (c, k) for c, k in _places(data["nodes"], []) if type(c[k]) in (int, float) and c[k] != 0
    ]
    container, key = rng.choice(numbers)
    container[key] = rng.choice([-1, 2, 3, 10**6, 0.5]) * container[key]


def delete_value(rng: random.Random, data: Data) -> None:
    container, key = _some_place(rng, data)
    del container[key]


def swap_values(rng: random.Random, data: Data) -> None:
    (one, a), (other, b) = _some_place(rng, data), _some_place(rng, data)
    one[a], other[b] = copy.deepcopy(other[b]), copy.deepcopy(one[a])


def nest(rng: random.Random, data: Data) -> None:
    container, key = _some_place(rng, data)
    for _ in range(rng.choice([3, 10, 400])):
        container[key] = rng.choice([[container[key]], {"tuple": [container[key]]}])


def rename_node(rng: random.Random, data: Data) -> None:
    node = rng.choice(data["nodes"])
    old, new = node[1], rng.choice([*NAMES, rng.choice(data["nodes"])[1]])
    node[1] = new
    for container, key in _places(data["nodes"], []):
        if container[key] == {"node": old}:
            container[key] = {"node": new}


def retarget(rng: random.Random, data: Data) -> None:
    node = rng.choice(data["nodes"])
    node[2] = rng.choice(
        [
            rng.choice(list(graph_json._FUNCTIONS)),
            rng.choice(list(graph_json._METHOD_NAMES)),
            rng.choice(data["nodes"])[2],
            rng.choice(PATHS),
        ]
    )


def rename_module(rng: random.Random, data: Data) -> None:
    old = rng.choice([path for path in data["modules"] if path])
    new = rng.choice(PATHS)
    owner = old.rpartition(".")[0]
    if rng.random() < 0.5 and owner:
        new = f"{owner}.{new}"

    def moved(path: str) -> str:
        return new + path.removeprefix(old) if path == old or path.startswith(f"{old}.") else path

    data["modules"] = {moved(path): module for path, module in data["modules"].items()}
    for node in data["nodes"]:
        if node[0] in ("get_attr", "call_module"):
            node[2] = moved(node[2])


def add_module(rng: random.Random, data: Data) -> None:
    kinds = [module["kind"] for module in data["modules"].values()]
    data["modules"][rng.choice(PATHS)] = {"kind": rng.choice([*kinds, "Module", "Popen"])}


def rewire(rng: random.Random, data: Data) -> None:
    uses = [(c, k) for c, k in _places(data["nodes"], []) if k == "node"]
    container, key = rng.choice(uses)
    container[key] = rng.choice(data["nodes"])[1]


def reorder_nodes(rng: random.Random, data: Data) -> None:
    nodes = data["nodes"]
    a, b = rng.randrange(len(nodes)), rng.randrange(len(nodes))
    nodes[a], nodes[b] = nodes[b], nodes[a]


def insert_node(rng: random.Random, data: Data) -> None:
    op, target, args = copy.deepcopy(rng.choice(INSERTED))
    node = [op, rng.choice(["added", *NAMES]), target, args, {}, {}]
    data["nodes"].insert(rng.randrange(len(data["nodes"]) + 1), node)


def copy_node(rng: random.Random, data: Data) -> None:
    node = copy.deepcopy(rng.choice(data["nodes"]))
    node[1] = rng.choice([node[1], "copied"])
    data["nodes"].insert(rng.randrange(len(data["nodes"]) + 1), node)


def add_argument(rng: random.Random, data: Data) -> None:
    node = rng.choice(data["nodes"])
    value = copy.deepcopy(rng.choice([*VALUES, {"node": rng.choice(data["nodes"])[1]}]))
    if rng.random() < 0.5:
        node[3].append(value)
    else:
        node[4][rng.choice(["out", "dtype", "device", "generator", "dim", "max_norm", "x=1"])] = (
            value
        )


def change_info(rng: random.Random, data: Data) -> None:
    facts = data["info"]
    key = rng.choice(["level", "scheme", "vocab_size", "blocks", "head", "embeddings", "config"])
    texts = ["float", "qdq", "integer", "w4", "fp", "w8a8-static", "print", '{"a": 1}', "\x07", []]
    facts[key] = rng.choice([*texts, 1, -5, 10**30, None, ["__class__"], HUGE])


def change_record(rng: random.Random, data: Data) -> None:
    record = rng.choice(data["info"]["site_records"] or [{}])
    record["spec"] = rng.choice(
        ["w2", "w8", "w4-g8", "w4-asym", "w8-tensor", "a8-static", "fp", "?", "wnf4", "mxfp4"]
    )


JSON_CHANGES: tuple[Callable[[random.Random, Data], None], ...] = (
    *(replace_value, replace_value, nudge_number, delete_value, swap_values, nest, rename_node),
    *(rename_node, retarget, retarget, rename_module, add_module, rewire, rewire, reorder_nodes),
    *(insert_node, insert_node, copy_node, add_argument, change_info, change_record),
)


def _other_values(rng: random.Random, value: Tensor) -> Tensor:
    flat = value.flatten().clone()
    if not flat.numel():
        return torch.ones(3, dtype=value.dtype)
    numbers: list[float] = [0, 1, -1, 127, -128, 255, 8, -9, 2**31 - 1]
    if value.is_floating_point():
        numbers += [float("nan"), float("inf"), -float("inf"), 1e38, -1e-38]
    at = rng.randrange(flat.numel())
    number = rng.choice(numbers)
    try:
        flat[at] = number
    except RuntimeError:  # beyond the dtype
        flat[at] = 1
    if rng.random() < 0.2:
        flat[:] = flat[at].clone()
    return flat.view(value.shape)


def _other_bytes(rng: random.Random, value: Tensor) -> Tensor:
    """Another pattern in one byte or a few: a code, an exponent, NaN, -0."""
    stored = value.contiguous().clone()
    if not stored.numel():
        return torch.ones(3, dtype=value.dtype)
    held = stored.view(-1).view(torch.uint8)
    for _ in range(rng.choice([1, 1, 3])):
        pattern = rng.choice([0, 1, 0x7C, 0x7E, 0x7F, 0x80, 0x88, 0xFE, 0xFF, rng.randrange(256)])
        held[rng.randrange(held.numel())] = pattern
    return stored


def change_tensor(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    how = rng.choice(
        ["values", "values", "bytes", "bytes", "dtype", "shape", "name", "gone", "swap"]
    )
    if how == "values":
        tensors[name] = _other_values(rng, value)
    elif how == "bytes":
        tensors[name] = _other_bytes(rng, value)
    elif how == "dtype":
        dtypes = [torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64]
        kind = rng.choice([*dtypes, torch.float8_e4m3fn, torch.float8_e5m2])
        same = kind.itemsize == value.element_size() and rng.random() < 0.5
        tensors[name] = value.view(kind) if same else value.to(kind)
    elif how == "shape":
        shapes = (
            [value[None], value.flatten(), value[:1] if value.dim() else value, value.t()]
            if (value.dim() <= 2)
            else [value[None]]
        )
        tensors[name] = rng.choice(shapes).contiguous().clone()
    elif how in ("name", "gone"):
        del tensors[name]
        if how == "name":
            tensors[rng.choice([*PATHS, f"{name}x"])[:200]] = value
    else:
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], value
    save_file({key: each.clone() for key, each in tensors.items()}, path)
    sign(folder)


def change_files(rng: random.Random, folder: Path) -> None:
    """Things in the folder that no manifest lists, and files that are something else."""
    how = rng.randrange(8)
    victim = rng.choice(sorted(p for p in folder.iterdir() if p.name != MANIFEST))
    outside = folder.parent / "outside"
    if how == 0:
        (folder / rng.choice(["tokenizer.json", ".hidden", "x.safetensors"])).write_text("{}")
    elif how == 1:
        os.mkfifo(folder / "pipe")
    elif how == 2:
        shutil.copy(victim, outside)
        victim.unlink()
        victim.symlink_to(outside)
    elif how == 3:
        (folder / "elsewhere").symlink_to(folder.parent)
    elif how == 4:
        victim.unlink()
        os.mkfifo(victim)
    elif how == 5:
        victim.unlink()
        victim.mkdir()
    elif how == 6:
        (folder / "sub").mkdir()
        (folder / "sub" / "graph.json").write_text("{}")
    else:
        victim.unlink()
    if how in (0, 6) and rng.random() < 0.5:
        sign(folder)


def change_text(rng: random.Random, folder: Path) -> None:
    """graph.json as text: keys given twice, other documents, cut and deep ones."""
    text = (folder / "graph.json").read_text()
    write(
        folder,
        rng.choice(
            [
                text.replace('{"class_name"', '{"nodes":[],"class_name"', 1),
                text.replace('"modules":{', '"modules":{"":{"kind":"Module"},', 1),
                text[: rng.randrange(len(text))],
                "[" * 100_000,
                '{"a":' * 100_000,
                "null",
                "[]",
                text + text,
                text.replace("[", "[[", 1),
                text.replace(":0", ":1e999", 1),
            ]
        ),
    )
