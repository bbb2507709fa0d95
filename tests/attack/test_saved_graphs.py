"""Whatever ``save`` writes, ``load`` reads, bit for bit: graphs edited at random, as users may.

The seed, in each assertion, follows --seed, or is FXQUANT_FUZZ_SEED.
"""

from __future__ import annotations

import copy
import functools
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import fxquant
from fxquant.errors import CheckpointError
from fxquant.ir.graph import info, update_info
from tests.architectures import ARCHITECTURES, token_ids
from tests.attack.conftest import SeedOf

SEED = 20261127
NAMES = ("opt", "gpt2", "llama")
SCHEMES = ("fp", "w8", "w4-g8", "w8a8-static", "w8a8-dynamic-token+smooth", "w8a8-static+kv4")
IDS = token_ids(2, 8)


@functools.cache
def converted(name: str, scheme: str, level: str) -> GraphModule:
    return fxquant.convert(ARCHITECTURES[name](), scheme, calibration=[IDS], level=level)


def _owner(gm: GraphModule, rng: random.Random) -> tuple[nn.Module, str, Tensor]:
    """Some tensor of the graph and where it hangs."""
    found = [
        (module, name, value)
        for module in gm.modules()
        for name, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None
    ]
    return rng.choice(found)


def _tensor(change: Callable[[Tensor, random.Random], Tensor]) -> Callable[..., None]:
    def edit(gm: GraphModule, rng: random.Random) -> None:
        module, name, value = _owner(gm, rng)
        made = change(value.detach().clone(), rng)
        if name in module._buffers:
            module._buffers[name] = made
        else:
            module._parameters[name] = nn.Parameter(made, requires_grad=False)

    return edit


def _filled(value: Tensor, rng: random.Random) -> Tensor:
    if value.numel():
        value[(0,) * value.dim()] = rng.choice([0, 1, -1, 100, 3])
    return value


def _spoiled(value: Tensor, rng: random.Random) -> Tensor:
    if value.is_floating_point() and value.numel():
        value[(0,) * value.dim()] = rng.choice([float("nan"), float("inf"), -0.0, 1e-40, 3e38])
    return value


def _seen_otherwise(value: Tensor, rng: random.Random) -> Tensor:
    kind = rng.randrange(4)
    if kind == 0 and value.dim() > 1:
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 1:
        return value[:1].expand(value.shape) if value.dim() else value
    if kind == 2:
        return torch.stack([value, value], -1)[..., 0]
    return value[..., :0] if value.dim() else value[None]


def _node(gm: GraphModule, rng: random.Random) -> Node:
    nodes = [each for each in gm.graph.nodes if each.op not in ("placeholder", "output")]
    found: Node = rng.choice(nodes)
    return found


def _behind(make: Callable[[Any, Node, random.Random], Node]) -> Callable[..., None]:
    """Put a node behind another, which its users read in its place."""

    def edit(gm: GraphModule, rng: random.Random) -> None:
        node = _node(gm, rng)
        with gm.graph.inserting_after(node):
            made = make(gm.graph, node, rng)
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)

    return edit


def _function(graph: Any, node: Node, rng: random.Random) -> Node:
    function = rng.choice(
        [torch.relu, torch.abs, torch.neg, torch.sigmoid, torch.erf, torch.clone, torch.dropout,
         torch.nn.functional.gelu, torch.sort, torch.numel, id, torch.fft.fft]
    )  # fmt: skip
    return graph.call_function(function, (node,))  # type: ignore[no-any-return]


def _literal(graph: Any, node: Node, rng: random.Random) -> Node:
    literal = rng.choice(
        [0, 1.5, -0.0, 1e308, float("inf"), float("nan"), 10**30, True, None, "x", 1j, (1, 2), [1],
         slice(None), torch.float16, torch.device("cpu"), b"x", range(3), {"a": 1}, ...]
    )  # fmt: skip
    return graph.call_function(rng.choice([torch.add, torch.mul]), (node, literal))  # type: ignore[no-any-return]


def _method(graph: Any, node: Node, rng: random.Random) -> Node:
    name = rng.choice(["clone", "contiguous", "tolist", "relu_", "to", "no_such", "__class__", "T"])
    return graph.call_method(name, (node,), rng.choice([{}, {"dtype": torch.float32}]))  # type: ignore[no-any-return]


def _renamed(gm: GraphModule, rng: random.Random) -> None:
    _node(gm, rng).name = rng.choice(["self", "torch", "x y", "", "ä", "a" * 3000, "print", "x"])


def _retargeted(gm: GraphModule, rng: random.Random) -> None:
    _node(gm, rng).target = _node(gm, rng).target


def _module(gm: GraphModule, rng: random.Random) -> None:
    path = rng.choice([path for path, module in gm.named_modules() if path and not module._modules])
    made = rng.choice([nn.Identity(), nn.Dropout(0.5), nn.Sequential(nn.ReLU()), nn.GELU("tanh")])
    gm.set_submodule(path, made)


def _extra(gm: GraphModule, rng: random.Random) -> None:
    name = rng.choice(["extra", "self", "__x", "a b", "forward2"])
    gm.register_buffer(name, rng.choice([torch.ones(3), torch.ones(0), torch.ones(2, 2).t()]))


def _tied(gm: GraphModule, rng: random.Random) -> None:
    (one, name, value), (other, second, same) = _owner(gm, rng), _owner(gm, rng)
    if value.shape == same.shape and (name in one._buffers) == (second in other._buffers):
        (one._buffers if name in one._buffers else one._parameters)[name] = same  # type: ignore[assignment]


def _facts(gm: GraphModule, rng: random.Random) -> None:
    field, value = rng.choice(
        [("model", "\ud800"), ("model", "x" * 10**5), ("scheme", "w3"), ("scheme", ""),
         ("vocab_size", 10**12), ("vocab_size", 7), ("max_positions", 0), ("max_positions", None),
         ("config", "{"), ("weights", "\x1b[2J"), ("sites", info(gm).sites[:-1]), ("history", ())]
    )  # fmt: skip
    update_info(gm, **{field: value})


def _trained(gm: GraphModule, rng: random.Random) -> None:
    gm.train()


EDITS: dict[str, Callable[[GraphModule, random.Random], None]] = {
    "nothing": lambda gm, rng: None, "trained": _trained,
    "filled": _tensor(_filled), "spoiled": _tensor(_spoiled), "seen": _tensor(_seen_otherwise),
    "half": _tensor(lambda value, rng: value.half()), "double": _tensor(lambda v, rng: v.double()),
    "wide": _tensor(lambda value, rng: value.long()), "function": _behind(_function),
    "literal": _behind(_literal), "method": _behind(_method), "renamed": _renamed,
    "target": _retargeted, "module": _module, "extra": _extra, "tied": _tied, "facts": _facts,
}  # fmt: skip


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.nan_to_num(7e7), other.nan_to_num(7e7))


@torch.no_grad()
def outcome(gm: GraphModule, folder: Path) -> str:
    try:
        fxquant.save(gm, folder)
    except CheckpointError:
        return "refused"
    loaded = fxquant.load(folder)
    state, again = gm.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    for name, value in state.items():
        assert value.dtype == again[name].dtype, name
        assert value.numel() == 0 or torch.equal(value, again[name]) or same(value, again[name])
    assert info(loaded) == info(gm)
    gm.recompile()
    assert same(gm.eval()(IDS), loaded(IDS)), "other logits"
    return "right"


def _insert(gm: GraphModule, operand: Node, target: str, make: Callable[..., Node]) -> None:
    """Put ``make``'s node between ``operand`` and the nodes of the operator ``target``."""
    user = next(node for node in operand.users if str(node.target).startswith(f"fxquant.{target}"))
    with gm.graph.inserting_before(user):
        user.replace_input_with(operand, make(gm.graph, operand))


def _of(gm: GraphModule, target: str) -> Node:
    found: Node = next(n for n in gm.graph.nodes if str(n.target).startswith(f"fxquant.{target}"))
    return found


def _sums_negated(gm: GraphModule) -> None:
    sums = _of(gm, "int_gemm")
    _insert(gm, sums, "rescale", lambda graph, node: graph.call_function(torch.neg, (node,)))


def _sums_copied(gm: GraphModule) -> None:
    sums = _of(gm, "int_gemm")
    _insert(gm, sums, "rescale", lambda graph, node: graph.call_method("contiguous", (node,)))


def _scale_within(gm: GraphModule) -> None:
    row = _of(gm, "rescale").args[2]
    assert isinstance(row, Node)
    (scale,) = row.all_input_nodes
    with gm.graph.inserting_before(row):
        row.replace_input_with(scale, gm.graph.call_method("contiguous", (scale,)))


def _codes_copied(gm: GraphModule) -> None:
    codes = _of(gm, "int_gemm").args[1]
    assert isinstance(codes, Node)
    _insert(gm, codes, "int_gemm", lambda graph, node: graph.call_method("contiguous", (node,)))


def _scale_a_number(gm: GraphModule) -> None:
    rescale = _of(gm, "rescale")
    rescale.args = (*rescale.args[:2], 1.0, *rescale.args[3:])


def _no_weight(gm: GraphModule) -> None:
    site = next(site for site in info(gm).sites if site.role == "head")
    if isinstance(gm.get_submodule(site.path), nn.Linear):
        gm.set_submodule(site.path, nn.GELU())


@pytest.mark.parametrize(
    "edit",
    [_sums_negated, _sums_copied, _scale_within, _codes_copied, _scale_a_number, _no_weight],
)
@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-dynamic-token"])
def test_operands_that_are_not_the_operators_own(
    edit: Callable[[GraphModule], None], scheme: str, tmp_path: Path
) -> None:
    gm = copy.deepcopy(converted("opt", scheme, "integer"))
    edit(gm)
    with pytest.raises(CheckpointError, match=r"^the graph cannot be saved: .{20}"):
        fxquant.save(gm, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [16, pytest.param(1000, marks=pytest.mark.slow)])
def test_what_is_saved_is_loaded(count: int, tmp_path: Path, seed_of: SeedOf) -> None:
    seed = seed_of(SEED) + count
    rng, counts, wrong = random.Random(seed), Counter[str](), []
    for index in range(count):
        parts = rng.choice(NAMES), rng.choice(SCHEMES), rng.choice(["qdq", "integer"])
        gm = copy.deepcopy(converted(*parts))
        done = rng.choices(sorted(EDITS), k=rng.randint(1, 2))
        for name in done:
            EDITS[name](gm, rng)
        try:
            counts[outcome(gm, tmp_path / "saved")] += 1
        except Exception as error:
            wrong.append(f"graph {index}, {parts} with {done}: {type(error).__name__}: {error}")
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
    said = f"seed {seed}: {count} tried, {dict(counts)}, {len(wrong)} wrong"
    print(said)
    assert not wrong, "\n".join([said, *wrong])
    assert count < 1000 or min(counts["refused"], counts["right"]) > count // 10  # of many
