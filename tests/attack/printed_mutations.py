"""Changes of what a saved graph says of itself: texts that are printed, sizes, other JSON files."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxquant.checkpoint import manifest
from tests.attack.json_mutations import mutated
from tests.attack.mutations import (
    JSON_CHANGES,
    change_files,
    change_tensor,
    change_text,
    sign,
    write,
)

Data = dict[str, Any]
SITES = (
    *("w8", "w4", "w4-g8", "w4-g8-asym", "w8-tensor", "w3-g8", "fp", "fp32-gemm", "w8-asym"),
    *("w8a8-static", "w8a8-static:absmax", "w8a8-static:mse", "w8a8-static-asym", "w8a8-dynamic"),
    *("w8a8-dynamic-token", "w4-g8/a8-dynamic", "w4-g8-asym/a8-static-asym:absmax", "w8a4-static"),
    *("w8 ", "W8", "w8/a8-static", "w8a8-static:p99.9", "w8a8-static-best"),
    *("fp8", "mxfp4", "nvfp4", "wnf4", "wnf4-g8", "we2m1-g8-e8m0-even", "we2m1-g8-e4m3", "wfp8"),
    *("we4m3/ae4m3-static:absmax", "we5m2/a8-static", "we3m2-g8-e8m0", "we2m3-g8-e8m0-rceil"),
)
FORMATS = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "nf4", "int8", "fp32", "e8m0", "e8m0-rceil", "x")
REPAIRS = (
    *("smooth", "smooth(alpha=0.7)", "smooth(insert=true)", "awq", "gptq", "gptq(order=static)"),
    *("rotate", "rotate(seed=1)", "attn8", "kv8", "kv4", "clip", "equalize", "refine"),
    *("split_outliers(threshold=2)", "split_outliers(threshold=3)", "correct_bias", "magic"),
)
NUMBERS = (
    -1,
    0,
    1,
    2,
    7,
    63,
    65,
    10**4,
    10**6,
    10**9,
    2**31,
    2**48,
    2**63,
    0.5,
    -0.25,
    1e-30,
    3e38,
)


def other_scheme(rng: random.Random, data: Data) -> None:
    """Another site's text, a repair more, fewer or elsewhere, another override."""
    text = data["info"]["scheme"]
    form = json.loads(text) if text.startswith("{") else {"scheme": text, "overrides": {}}
    site, *repairs = form["scheme"].split("+")
    how = rng.randrange(5)
    if how == 0:
        site = rng.choice(SITES)
    elif how == 1:
        repairs.insert(rng.randint(0, len(repairs)), rng.choice(REPAIRS))
    elif how == 2 and repairs:
        repairs[rng.randrange(len(repairs))] = rng.choice(REPAIRS)
    elif how == 3:
        rng.shuffle(repairs)
    else:
        paths = [each["path"] for each in data["info"]["sites"]]
        pattern = rng.choice(["head", "embeddings", "matmul", "*", "*q_proj", rng.choice(paths)])
        form["overrides"][pattern] = rng.choice(SITES)
    form["scheme"] = "+".join([site, *repairs])
    data["info"]["scheme"] = json.dumps(form) if form["overrides"] else form["scheme"]


def spec_of_a_record(rng: random.Random, data: Data) -> None:
    record = rng.choice(data["info"]["site_records"])
    text = rng.choice(SITES)
    record["spec"] = text.rpartition("/")[2] if record.get("operand") else text


def doubled_record(rng: random.Random, data: Data) -> None:
    records = data["info"]["site_records"]
    records.insert(rng.randint(0, len(records)), copy.deepcopy(rng.choice(records)))


def dropped_record(rng: random.Random, data: Data) -> None:
    records = data["info"]["site_records"]
    del records[rng.randrange(len(records))]


def moved_record(rng: random.Random, data: Data) -> None:
    """Two records change places, or some of their fields do."""
    one, other = (rng.choice(data["info"]["site_records"]) for _ in range(2))
    fields = rng.choice([["path"], ["scale"], ["scale", "low", "high"], ["operand"], ["spec"]])
    for name in fields:
        one[name], other[name] = other[name], one[name]


def other_range(rng: random.Random, data: Data) -> None:
    record = rng.choice(data["info"]["site_records"])
    name = rng.choice(
        ["scale", "zero_point", "estimator", "low", "high", "seen_low", "clipped", "histogram"]
    )
    found = record.get(name)
    scaled = found * rng.choice([-1, 0.5, 1.01, 2]) if type(found) is float else None
    record[name] = rng.choice([scaled, None, *NUMBERS, "absmax", "mse", "p99", [-1, 3]])


def other_ends(rng: random.Random, data: Data) -> None:
    """Literals of one operator of ours: ends, bits, groups, granularity, symmetry."""
    nodes = [node for node in data["nodes"] if node[2].startswith("fxquant.")]
    node = rng.choice(nodes)
    places = [index for index, each in enumerate(node[3]) if not isinstance(each, dict)]
    ends = ["token", "tensor", True, False, None, -128, -127, -8, -7, 7, 127, 0, 4, 8, 1024]
    place = rng.choice(places)
    node[3][place] = rng.choice(FORMATS if node[3][place] in FORMATS else ends)


def other_count(rng: random.Random, data: Data) -> None:
    facts = data["info"]
    name = rng.choice(["vocab_size", "max_positions", "parameters", "float_bytes", "embeddings"])
    facts[name] = rng.choice([*NUMBERS, None, []])
    if rng.random() < 0.3:
        facts["embeddings"] = None


def other_site(rng: random.Random, data: Data) -> None:
    sites = data["info"]["sites"]
    one, other = rng.choice(sites), rng.choice(sites)
    how = rng.randrange(5)
    if how == 0:
        one["path"], other["path"] = other["path"], one["path"]
    elif how == 1:
        one["shape"] = rng.choice([other["shape"], one["shape"][::-1], [1, 1], [2**40, 2**40]])
    elif how == 2:
        one["role"] = rng.choice(["linear", "head", "embeddings", "matmul", "x"])
    elif how == 3:
        one["bias"] = not one.get("bias")
    else:
        sites.remove(one)


def other_tag(rng: random.Random, data: Data) -> None:
    tags = [node[5] for node in data["nodes"] if node[5].get("site")]
    one, other = rng.choice(tags), rng.choice(tags)
    name = rng.choice(["site", "is_output", "origin"])
    one[name], other[name] = other.get(name), one.get(name)


def other_history(rng: random.Random, data: Data) -> None:
    history = data["info"]["history"]
    how = rng.randrange(4)
    record = rng.choice(history)
    if how == 0:
        history.remove(record)
    elif how == 1:
        rng.shuffle(history)
    elif how == 2:
        record["spelling"] = rng.choice([*REPAIRS, "\x1b[2J", "x" * 400, "", "smooth(alpha=nan)"])
    else:
        record["name"] = rng.choice([*REPAIRS, "quantize"])


def other_calibration(rng: random.Random, data: Data) -> None:
    found = data["info"].get("calibration")
    data["info"]["calibration"] = mutated(found, rng, rng.randint(1, 3)) if found else [{}]


def other_dtype(rng: random.Random, data: Data) -> None:
    literals = [
        value
        for node in data["nodes"]
        for value in (*node[3], *node[4].values())
        if isinstance(value, dict) and "dtype" in value
    ]
    rng.choice(literals)["dtype"] = rng.choice(
        ["int8", "uint8", "int64", "float16", "float64", "bool", "float8", "float8_e4m3fn", 3]
    )


def other_leaf(rng: random.Random, data: Data) -> None:
    """A leaf's kind, options or tensors' roles."""
    paths = [path for path, module in data["modules"].items() if module["kind"] != "Module"]
    path = rng.choice(paths)
    other = data["modules"][rng.choice(paths)]
    module = data["modules"][path]
    name = rng.choice(["kind", "options", "tensors"])
    if rng.random() < 0.5:
        module[name] = mutated(module.get(name, {}), rng) if name != "kind" else other["kind"]
    else:
        module[name] = copy.deepcopy(other.get(name, {}))


def more_multiplied(rng: random.Random, data: Data) -> None:
    """Ids or positions multiplied on their way to a table."""
    tables = [
        node
        for node in data["nodes"]
        if node[2] == "functional.embedding"
        or (node[0] == "call_module" and data["modules"][node[2]]["kind"] == "Embedding")
    ]
    table = rng.choice(tables)
    factor = rng.choice([2, 3, -1, 10**6])
    node = ["call_function", "more", "operator.mul", [table[3][0], factor], {}, {}]
    data["nodes"].insert(data["nodes"].index(table), node)
    table[3][0] = {"node": "more"}


PRINTED: tuple[Callable[[random.Random, Data], None], ...] = (
    *(other_scheme, other_scheme, other_scheme, spec_of_a_record, doubled_record, dropped_record),
    *(moved_record, moved_record, other_range, other_range, other_ends, other_ends, other_count),
    *(other_count, other_site, other_tag, other_history, other_calibration, other_calibration),
    *(other_dtype, other_leaf, other_leaf, more_multiplied),
)


def change_json_file(rng: random.Random, folder: Path) -> None:
    """One of the folder's JSON files, the manifest too, as values or as text."""
    path = rng.choice(sorted(folder.glob("*.json")))
    text = path.read_text()
    body = json.loads(text)
    if rng.random() < 0.3:
        path.write_text(
            rng.choice([text[:-9], "[" * 9999, "NaN", text.replace(":", ":9" + "9" * 400, 1), ""])
        )
        if path.name != manifest.MANIFEST:
            sign(folder)
        return
    changed = mutated(body, rng, rng.choice([1, 1, 2]))
    if path.name == manifest.MANIFEST and isinstance(changed, dict):
        changed.pop("sha256", None)
        if rng.random() < 0.3:
            changed["version"] = rng.choice([3, 10**300, -1, 0, "2", True, None, [2]])
            changed["written_by"] = rng.choice(["\x1b[2J", {"x": "y" * 9999}, None])
        path.write_bytes(manifest._canonical(changed))
        return
    path.write_text(json.dumps(changed))
    sign(folder)


def mutate(seed: int, folder: Path) -> str:
    """Change the checkpoint at ``folder`` and sign it; the names of the changes."""
    rng = random.Random(seed)
    kind = rng.random()
    for share, change in (
        (0.12, change_tensor),
        (0.17, change_files),
        (0.2, change_text),
        (0.25, change_json_file),
    ):
        if kind < share:
            change(rng, folder)
            return change.__name__
    data = json.loads((folder / "graph.json").read_text())
    found = PRINTED if kind < 0.65 else JSON_CHANGES
    changes = [rng.choice(found) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    for each in changes:
        # An earlier change may have taken away what this one works on.
        with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError, ValueError):
            each(rng, data)
    write(folder, data)
    return " ".join(each.__name__ for each in changes)
